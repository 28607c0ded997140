"""The RoPE of each stage of a training that grows in length.

Every stage's RoPE is made from the model's own. That equals making it from the stage before when
the method composes, as `critical`, `ntk` and the methods that count from the native length do; then
a run may be cut into stages, resumed and lengthened without its frequencies jumping.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec
from extend.rope import frequencies
from extend.rope.methods import apply_method

_SAME = 2e-4  # relative; gradient-v2 rounds thetas, by 0.5 in some 1e4, to whole numbers


@dataclass(frozen=True, slots=True)
class Stage:
    """A RoPE to make: `method` with its options, for `target_len` tokens.

    `critical` is the default because it composes and because as many pairs complete a turn in every
    stage as do natively.
    """

    target_len: int
    method: str = "critical"
    options: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, spec: RopeSpec) -> RopeSpec:
        return apply_method(self.method, spec, self.target_len, self.options)


def schedule_ropes(native: RopeSpec, stages: Sequence[Stage | None]) -> list[RopeSpec]:
    """The RoPE of each stage, made from `native`; None keeps that of the stage before.

    Raises:
        RecipeError, CompatibilityError: as `apply_method`.
    """
    ropes, current = [], native
    for stage in stages:
        current = current if stage is None else stage.apply(native)
        ropes.append(current)
    return ropes


def stepwise_ropes(native: RopeSpec, stages: Sequence[Stage]) -> list[RopeSpec]:
    """The RoPE of each stage, made from that of the stage before where it can be.

    It cannot when the stage before is scaled (linear, yarn, ...), which always counts from
    `native`, or was made for a longer length.
    """
    ropes, current = [], native
    for stage in stages:
        try:
            current = stage.apply(current)
        except (CompatibilityError, RecipeError):
            current = stage.apply(native)
        ropes.append(current)
    return ropes


def composition_warnings(native: RopeSpec, stages: Sequence[Stage | None]) -> list[str]:
    """What is wrong with a schedule that trains for other frequencies than it ends with.

    Two things are looked for at every stage but the first: frequencies that differ from those made
    step by step, and pairs that turn faster than in the stage before.

    Returns:
        one sentence or two for each such stage, with both thetas.
    """
    made = [stage for stage in stages if stage is not None]
    at_once, in_steps = schedule_ropes(native, made), stepwise_ropes(native, made)
    warnings = []
    for i in range(1, len(made)):
        stage, lengths = made[i], ", ".join(str(stage.target_len) for stage in made[:i + 1])
        if _differ(at_once[i], in_steps[i]):
            warnings.append(
                f"RoPE schedule: the stage of {stage.target_len} tokens ({stage.method}) does not "
                f"compose with the ones before: made from the native {native.original_len} tokens, "
                f"as it is here, it has {_describe(at_once[i])}; in steps of {lengths} it would "
                f"have {_describe(in_steps[i])}. critical in every stage has one "
                "theta either way")
        faster = _count_faster(at_once[i - 1], at_once[i])
        if faster:
            warnings.append(
                f"RoPE schedule: from {made[i - 1].target_len} to {stage.target_len} tokens "
                f"{faster} of {native.rotary_dim // 2} pairs turn faster again: "
                f"{_describe(at_once[i - 1])} is followed by {_describe(at_once[i])}, which undoes "
                "part of what was trained; let theta grow from stage to stage")
    return warnings


def _differ(one: RopeSpec, other: RopeSpec) -> bool:
    first, second = frequencies.inv_freq(one), frequencies.inv_freq(other)
    return bool(((first - second).abs() > _SAME * first.abs()).any())


def _count_faster(before: RopeSpec, after: RopeSpec) -> int:
    first, second = frequencies.inv_freq(before), frequencies.inv_freq(after)
    return int((second > first * (1 + _SAME)).sum())


def _describe(rope: RopeSpec) -> str:
    kind = f" ({rope.rope_type})" if rope.scaling else ""
    return f"theta {rope.rope_theta:.10g}{kind}"
