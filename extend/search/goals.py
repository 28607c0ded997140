"""What the search looks for, and which of the measured settings it returns.

A setting is judged on three axes: needle-answer loss at the target, loss on short text, and how
much it disturbs siblings. Short loss counts as its excess over the unchanged model. A goal is a
reference point; the shortfall of a setting is the logarithm of the factor by which it misses that
point on its worse axis, so that neither axis needs a unit.

Source of the reference points: Wierzbicki 1980, doi:10.1007/978-3-642-48782-8_32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extend.search.front import Bootstrap
from extend.search.lab import Result

NEEDLE, SHORT, SIBLINGS = 0, 1, 2
# Added before the logarithm, nats: differences below it do not matter.
_FLOORS = np.array([0.05, 0.005, 0.001])
EQUAL = 1e-3  # nats; a loss that is larger by less counts as equal
MARGIN = 0.05  # nats; needle losses farther than this above the least do not reach the target
ANSWERS = 1.5  # nats a token; digits that are guessed cost 2.3
_NEARLY = 0.1  # analytic methods; settings that match so many fewer than the most may be chosen


@dataclass(frozen=True, slots=True)
class Scale:
    """Turns points into comparable logarithms.

    Attributes:
        native_short: short loss of the unchanged model.
    """

    native_short: float

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Log of needle loss, excess short loss and disturbance, for points [..., 3]."""
        shifted = points - np.array([0.0, self.native_short, 0.0])
        return np.log(np.maximum(shifted, 0.0) + _FLOORS)


@dataclass(frozen=True, slots=True)
class Goal:
    """A reference point on some axes, in the units of `Scale`; inf where an axis is free."""

    name: str
    reference: np.ndarray

    def shortfall(self, scaled: np.ndarray) -> np.ndarray:
        """The worst miss over the axes, [n], for scaled points [n, 3]; negative beats it.

        The mean over the axes breaks ties, as in an augmented achievement function.
        """
        axes = np.isfinite(self.reference)
        missed = scaled[:, axes] - self.reference[axes]
        return missed.max(1) + 0.05 * missed.mean(1)


def goal_needle(scaled: np.ndarray) -> Goal:
    """Less needle loss than any so far, whatever it costs."""
    return Goal("needle", np.array([scaled[:, NEEDLE].min(), np.inf, np.inf]))


def goal_compromise(scaled: np.ndarray, analytic: np.ndarray) -> Goal:
    """The least needle loss and the least short loss of the analytic methods, both at once."""
    least = scaled[analytic].min(0)
    return Goal("compromise", np.array([least[NEEDLE], least[SHORT], np.inf]))


def goal_gentle(scaled: np.ndarray, analytic: np.ndarray) -> Goal:
    """The needle loss of the best analytic method at less short loss than any that has it."""
    limit = scaled[analytic, NEEDLE].min()
    reaching = scaled[:, NEEDLE] <= limit
    return Goal("gentle", np.array([limit, scaled[reaching, SHORT].min(), np.inf]))


def goal_merge_safe(scaled: np.ndarray, reaching: np.ndarray) -> Goal:
    """As good at the target as what reaches it, with less disturbance than any that does."""
    limit = scaled[reaching, NEEDLE].max()
    return Goal("merge-safe", np.array([limit, np.inf, scaled[reaching, SIBLINGS].min()]))


def goal_cover(scaled: np.ndarray, analytic: np.ndarray) -> Goal | None:
    """The analytic method that the others come least near to; None when all are matched."""
    others = scaled[~analytic]
    goals = [Goal("cover", np.array([*point[:2], np.inf])) for point in scaled[analytic]]
    misses = [float(goal.shortfall(others).min()) if len(others) else np.inf for goal in goals]
    worst = int(np.argmax(misses))
    return goals[worst] if misses[worst] > 0 else None


@dataclass(frozen=True, slots=True)
class Judge:
    """Compares settings by resamples of what they were measured on.

    Attributes:
        length: the target.
        threshold: needle loss that counts as reaching the target, or None.
        needle, short: of the items of the two axes.
    """

    length: int
    threshold: float | None
    needle: Bootstrap
    short: Bootstrap

    @property
    def limit(self) -> float:
        """Needle loss at which the target counts as reached at all."""
        return ANSWERS if self.threshold is None else self.threshold

    def reaching(self, results: Sequence[Result]) -> np.ndarray:
        """bool [n]: below the threshold, or hardly above the best.

        Hardly: the mean is at most `MARGIN` above, and the 95 % interval of the paired difference
        holds 0. The best itself may be above `limit`; then nothing reaches the target.
        """
        means = np.array([np.mean(r.needle[self.length]) for r in results])
        best = np.array(results[int(means.argmin())].needle[self.length])
        lows = [self.needle.interval(np.array(r.needle[self.length]) - best)[0] for r in results]
        reached = (np.array(lows) <= 0) & (means <= means.min() + MARGIN)
        return reached if self.threshold is None else reached | (means <= self.threshold)

    def matches(self, results: Sequence[Result], methods: Sequence[Result]) -> np.ndarray:
        """How many of `methods` each result is at least as good as on both axes, fp64 [n].

        The mean over the resamples, so that a clear lead counts for more than one by a hair. A
        method is as good as itself, so that it and a setting that matches all count alike.
        """
        def draws(group: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
            return (np.stack([self.needle.means(r.needle[self.length]) for r in group]),
                    np.stack([self.short.means(r.short_loss) for r in group]))

        needle, short = draws(results)
        own_needle, own_short = draws(methods)
        return np.array([((needle[i] <= own_needle + EQUAL) & (short[i] <= own_short + EQUAL))
                         .mean(1).sum() for i in range(len(results))])


RULES = {
    "needle": "the least needle loss at the target",
    "compromise": "at least as good on both needle and short loss as the most analytic methods "
                  f"(to {EQUAL:g} nats, mean over resamples); of equals the one with the least "
                  "product of both losses, short loss counted above the unchanged model's",
    "merge-safe": "the least disturbance of siblings among those that reach the target: needle "
                  f"loss is at most {MARGIN:g} nats above the least and the 95 % interval of the "
                  "paired difference holds 0, or it is below the given threshold",
    "theta": "as compromise, among plain thetas alone, which every loader reads alike; analytic "
             "methods that only change theta, such as ntk and critical, are among them",
    "reached": "whether the least needle loss of these settings is at most the given threshold, "
               f"or {ANSWERS:g} nats a token unless one is given: guessed digits cost 2.3",
    "never chosen": "the model as it is, and proportional, which most engines cannot read; they "
                    "are measured",
}


def choose(results: Sequence[Result], judge: Judge) -> dict[str, Result]:
    """Apply RULES to what was measured at the target."""
    native = next(r for r in results if r.candidate.origin == "native")
    offered = [r for r in results if r.candidate.may_be_chosen]
    points = np.array([r.point(judge.length) for r in offered])
    both = Scale(float(native.point(judge.length)[SHORT]))(points)[:, :SIBLINGS].sum(1)
    plain = np.array([not r.candidate.rope.scaling for r in offered])
    matches = judge.matches(offered, [r for r in results if r.candidate.origin == "analytic"])
    chosen = {"needle": int(points[:, NEEDLE].argmin()),
              "compromise": _least(both, matches >= matches.max() - _NEARLY),
              "merge-safe": _least(points[:, SIBLINGS], judge.reaching(offered))}
    if plain.any():
        most = matches[plain].max()
        chosen["theta"] = _least(both, plain & (matches >= most - _NEARLY))
    return {name: offered[i] for name, i in chosen.items()}


def best_analytic(results: Sequence[Result], length: int) -> Result:
    """The analytic method with the least needle loss, of those that engines can read."""
    methods = [r for r in results
               if r.candidate.origin == "analytic" and r.candidate.may_be_chosen]
    return min(methods, key=lambda r: float(r.point(length)[NEEDLE]))


def _least(values: np.ndarray, allowed: np.ndarray) -> int:
    """Index of the least value where allowed; there is always one."""
    return int(np.where(allowed, values, np.inf).argmin())
