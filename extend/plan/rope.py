"""Every RoPE method for one model and one target length, side by side. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from extend.errors import ExtendError, RecipeError
from extend.model_config import RopeSpec
from extend.registry import lookup
from extend.rope.factors import extension_factor
from extend.rope.methods import METHODS, apply_method
from extend.rope.schedule import Stage, composition_warnings, schedule_ropes, stepwise_ropes

if TYPE_CHECKING:
    from extend.rope.analysis import RopeAnalysis

DEFAULT_METHOD = "critical"


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of a schedule.

    Attributes:
        made: its RoPE, made from the native one.
        in_steps: its RoPE if every stage were made from the one before.
    """

    made: "RopeAnalysis"
    in_steps: RopeSpec


@dataclass(frozen=True, slots=True)
class RopePlan:
    """What each method makes of a native RoPE.

    Attributes:
        native: the plain RoPE that all start from.
        unchanged: the native RoPE at the target length.
        methods: name -> analysis, of those that can be applied.
        refused: name -> reason, of the others.
        method: the one that options were given for and that the schedule uses.
        stages: of the schedule, empty when none was asked for.
        warnings: what is wrong with the schedule.
    """

    native: RopeSpec
    target_len: int
    critical_index: float
    unchanged: "RopeAnalysis"
    methods: Mapping[str, "RopeAnalysis"]
    refused: Mapping[str, str]
    method: str
    options: Mapping[str, Any]
    stages: Sequence[StagePlan]
    warnings: Sequence[str]

    @property
    def factor(self) -> float:
        return self.target_len / self.native.original_len


def plan_rope(native: RopeSpec, target_len: int, *, method: str = DEFAULT_METHOD,
              options: Mapping[str, Any] | None = None, schedule: Sequence[int] = ()) -> RopePlan:
    """Apply every method of the family, and lay `method` out over the lengths of a schedule.

    Args:
        native: plain RoPE.
        target_len: tokens, at least the native length.
        options: of `method`; the others are applied with their defaults.
        schedule: tokens of each training stage, growing.

    Raises:
        RecipeError: `target_len` below the native length, a method or option that does not exist, a
            schedule that shrinks; or `method` itself cannot be applied although options are given.
        CompatibilityError: the RoPE is scaled already.
    """
    from extend.rope.analysis import analyse
    from extend.rope.frequencies import critical_index

    options = dict(options or {})
    lookup(METHODS, method, "--method")
    _check_lengths(schedule)
    extension_factor(native, target_len)  # one error instead of one for each method
    ropes, refused = _apply_all(native, target_len, method, options)
    stages = [Stage(length, method, options) for length in schedule]
    return RopePlan(
        native, target_len, critical_index(native), analyse(native, native, target_len),
        {name: analyse(rope, native, target_len) for name, rope in ropes.items()}, refused, method,
        options,
        [StagePlan(analyse(rope, native, stage.target_len), other) for stage, rope, other in
         zip(stages, schedule_ropes(native, stages), stepwise_ropes(native, stages))],
        composition_warnings(native, stages))


def _apply_all(native: RopeSpec, target_len: int, chosen: str,
               options: Mapping[str, Any]) -> tuple[dict[str, RopeSpec], dict[str, str]]:
    ropes, refused = {}, {}
    for name in METHODS:
        try:
            ropes[name] = apply_method(name, native, target_len,
                                       options if name == chosen else {})
        except ExtendError as error:
            if name == chosen and options:
                raise
            refused[name] = str(error)
    return ropes, refused


def _check_lengths(schedule: Sequence[int]) -> None:
    for before, after in pairwise(schedule):
        if after < before:
            raise RecipeError(f"--schedule: lengths must not shrink, but {after} follows {before}")
