"""Weights of a merge, one for each group of parameters, fitted without labels.

W = W_target + alpha[group] * delta. The alphas are what is learnt: the target's answers pull them
to where its skill stays, the hidden facts to where the long context comes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from extend.errors import RecipeError
from extend.registry import lookup
from extend.transfer.groups import GROUPS
from extend.transfer.learn import Course, LearnSettings, learn
from extend.transfer.objective import Lesson, Scores, judge
from extend.transfer.sums import Delta, added

log = logging.getLogger(__name__)
BOUNDS = (0.0, 1.5)
STARTS = (1.0, 0.5)
FIT = LearnSettings(steps=40, lr=0.05)


@dataclass(frozen=True)
class Fit:
    """Fitted weights.

    Attributes:
        groups: group -> alpha.
        weights: parameter -> alpha of its group.
        start: the alpha that the best course began with.
        scores: held-out scores of `rope` (alpha 0, the long RoPE alone), `plain` (alpha 1, a merge
            as it is) and `fitted`.
        history: start -> what each look at the held-out half found.
    """

    groups: dict[str, float]
    weights: dict[str, float]
    start: float
    scores: dict[str, Scores]
    history: dict[str, list[dict[str, Any]]]


def fit_weights(model: PreTrainedModel, deltas: Mapping[str, Delta], lesson: Lesson, *,
                groups: str = "kind", settings: LearnSettings = FIT,
                starts: Sequence[float] = STARTS,
                bounds: tuple[float, float] = BOUNDS) -> Fit:
    """Fit the weight of every group of deltas.

    Learning begins at each of `starts` with all groups alike; the course whose best look at the
    held-out half is lowest wins, the first of equal ones. As alpha 1 is a start, the result is
    never judged worse than the plain merge.

    Args:
        model: the target's weights under the long RoPE (`extend.rope.live.set_rope`); it comes out
            as it went in.
        deltas: name of a parameter -> its delta, on the model's device.
        lesson: of the same target under its own RoPE.
        groups: a member of `GROUPS`.
        starts: alphas to begin with.
        bounds: smallest and largest alpha.

    Raises:
        RecipeError: no such grouping, or a start out of bounds.
        CompatibilityError: a delta that does not fit the model.
        DataError: see `learn`.
        TrainingError: see `learn`.
    """
    group_of = lookup(GROUPS, groups, "groups")
    if not starts or any(not bounds[0] <= start <= bounds[1] for start in starts):
        raise RecipeError(f"starts are {list(starts)}; at least one is needed, and all between "
                          f"{bounds[0]} and {bounds[1]}")
    named = {name: group_of(name) for name in sorted(deltas)}
    alphas = {group: nn.Parameter(torch.zeros((), device=model.device))
              for group in sorted(set(named.values()))}
    with _frozen(model), added(model, deltas, {n: alphas[g] for n, g in named.items()}):
        scores = {"rope": judge(model, lesson)}
        _fill(alphas, 1.0)
        scores["plain"] = judge(model, lesson)
        courses: dict[float, tuple[Course, dict[str, float]]] = {}
        for start in starts:
            log.info("weights from %g", start)
            _fill(alphas, start)
            course = learn(model, list(alphas.values()), lesson, settings, bounds=bounds)
            courses[start] = course, {group: alpha.item() for group, alpha in alphas.items()}
    start = min(courses, key=lambda s: courses[s][0].objective)
    course, found = courses[start]
    return Fit(found, {name: found[group] for name, group in named.items()}, start,
               {**scores, "fitted": course.scores},
               {f"{s:g}": c.history for s, (c, _) in courses.items()})


@torch.no_grad()
def _fill(alphas: Mapping[str, nn.Parameter], value: float) -> None:
    for alpha in alphas.values():
        alpha.fill_(value)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient until the block ends."""
    asked = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
