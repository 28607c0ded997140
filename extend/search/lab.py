"""Measures candidates within a budget, and keeps what was measured."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from extend.console import progress
from extend.errors import CompatibilityError
from extend.model_config import RopeSpec
from extend.search.candidates import Candidate
from extend.search.data import SEARCH
from extend.search.measure import Items
from extend.search.store import Evaluation, EvaluationStore

logger = logging.getLogger(__name__)
AXES = ("needle", "short", "siblings")


class Measures(Protocol):
    """What `extend.search.measure.Meter` does."""

    def needle(self, rope: RopeSpec, length: int, split: str) -> list[float]: ...

    def short(self, rope: RopeSpec, split: str) -> tuple[list[float], list[float]]: ...

    def disturbance(self, rope: RopeSpec, split: str) -> dict[str, list[float]]: ...


class BudgetSpentError(Exception):
    """No evaluation is left."""


@dataclass(frozen=True, slots=True)
class Result:
    """Everything known of a candidate on one half of the data.

    Attributes:
        needle: length -> loss of each fact's answer.
        short_loss, short_kl: of each native-length window.
        siblings: name -> KL of each window.
    """

    candidate: Candidate
    needle: Mapping[int, list[float]]
    short_loss: list[float]
    short_kl: list[float]
    siblings: Mapping[str, list[float]]

    def point(self, length: int) -> np.ndarray:
        """Mean needle loss, short loss and disturbance, fp64 [3]; the order of `AXES`."""
        return np.array([np.mean(self.needle[length]), np.mean(self.short_loss), self.disturbance])

    @property
    def disturbance(self) -> float:
        """Mean over the siblings of their mean KL."""
        return float(np.mean([np.mean(values) for values in self.siblings.values()]))


class Lab:
    """Evaluates candidates; one at one length on one half of the data is one evaluation.

    What the store holds is looked up instead of measured, and counts when it is asked for. So a
    search that was interrupted takes the same steps again and ends as if it had not been.

    Args:
        spent: evaluations made before, which count too.
    """

    def __init__(self, meter: Measures, store: EvaluationStore, *, budget: int, spent: int):
        self.meter, self.store, self.budget, self.spent = meter, store, budget, spent
        self._asked: dict[tuple[str, int, str], Candidate] = {}

    @property
    def used(self) -> int:
        return self.spent + len(self._asked)

    @property
    def left(self) -> int:
        return self.budget - self.used

    def is_known(self, candidate: Candidate, length: int, split: str = SEARCH) -> bool:
        """Whether this search has asked for it."""
        return (candidate.key, length, split) in self._asked

    def measure(self, candidate: Candidate, length: int, split: str = SEARCH) -> Result:
        """Evaluate, or look up.

        Raises:
            BudgetSpentError: it was not asked for before, and no evaluation is left.
        """
        if not self.is_known(candidate, length, split):
            if self.left <= 0:
                raise BudgetSpentError
            if self.store.get(candidate.key, length, split) is None:
                self._evaluate(candidate, length, split)
            self._asked[candidate.key, length, split] = candidate
            self._log(candidate, length, split)
        return self.result(candidate, split)

    def result(self, candidate: Candidate, split: str = SEARCH) -> Result:
        """All that was measured of a candidate."""
        own = self._of(candidate, split)
        full = next(e.items for e in own if e.items.short_loss)
        return Result(candidate, {e.length: e.items.needle for e in own}, full.short_loss,
                      full.short_kl, full.siblings)

    def results(self, length: int, split: str = SEARCH) -> list[Result]:
        """Of every candidate that was asked for at a length, in the order they came."""
        return [self.result(candidate, split) for (_, own, half), candidate in self._asked.items()
                if (own, half) == (length, split)]

    def evaluations(self) -> list[Evaluation]:
        """Those that this search asked for, in order."""
        found = [self.store.get(*place) for place in self._asked]
        return [evaluation for evaluation in found if evaluation is not None]

    def _of(self, candidate: Candidate, split: str) -> list[Evaluation]:
        key = candidate.key
        return [e for e in self.store.all() if e.candidate["key"] == key and e.split == split]

    def _evaluate(self, candidate: Candidate, length: int, split: str) -> None:
        begin = time.monotonic()
        items = Items(self.meter.needle(candidate.rope, length, split))
        if not any(e.items.short_loss for e in self._of(candidate, split)):
            loss, kl = self.meter.short(candidate.rope, split)
            items = Items(items.needle, loss, kl, self.meter.disturbance(candidate.rope, split))
        _check_finite(candidate, items, length)
        seconds = round(time.monotonic() - begin, 3)
        self.store.add(Evaluation(describe(candidate), length, split, items, seconds))

    def _log(self, candidate: Candidate, length: int, split: str) -> None:
        needle, short, disturbance = self.result(candidate, split).point(length)
        logger.info("%3d/%d  %-36s %7d %-8s needle %.3f  short %.4f  siblings %.4f", self.used,
                    self.budget, candidate.name[:36], length, split, needle, short, disturbance,
                    extra=progress(self.used, self.budget))


def _check_finite(candidate: Candidate, items: Items, length: int) -> None:
    values = [*items.needle, *items.short_loss, *items.short_kl,
              *(v for sibling in items.siblings.values() for v in sibling)]
    if not np.isfinite(values).all():
        raise CompatibilityError(f"{candidate.name}: a loss at {length} tokens is not finite; the "
                                 "weights may hold values that are none, or overflow in this dtype")


def describe(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON."""
    return {"key": candidate.key, "name": candidate.name, "origin": candidate.origin,
            "method": candidate.method, "options": dict(candidate.options),
            "shape": dict(candidate.shape), "aliases": list(candidate.aliases),
            "rope": candidate.rope.to_json()}
