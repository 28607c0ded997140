"""In what order candidates are tried: analytic methods, thetas, then curves, coarse to fine."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extend.model_config import RopeSpec
from extend.search.candidates import (
    Candidate,
    curve_candidate,
    features,
    native_candidate,
    theta_candidate,
)
from extend.search.curve import DIMENSIONS, CurveSpace, halton
from extend.search.data import HELD_OUT
from extend.search.front import on_front
from extend.search.goals import (
    NEEDLE,
    Goal,
    Judge,
    Scale,
    best_analytic,
    choose,
    goal_compromise,
    goal_cover,
    goal_gentle,
    goal_merge_safe,
    goal_needle,
)
from extend.search.lab import BudgetSpentError, Lab, Result
from extend.search.surrogate import fit

logger = logging.getLogger(__name__)

_GOLDEN = (math.sqrt(5) - 1) / 2
_MOST_THETAS, _MOST_CURVES, _GOLDEN_STEPS = 6, 12, 4
_POOL, _NEARBY, _STEP = 1500, 400, 0.08  # curves compared by the model before one is measured
_CHOSEN = 4  # settings that are returned, at most; they and the model as it is are checked
_OPTIMISM = 0.5  # standard deviations that a guess is lowered by, so that the unknown is tried
_SAME_FEATURES = 0.01  # settings nearer than this, per pair, are not worth a second evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How the budget is spent.

    Attributes:
        rungs: lengths at which candidates are screened first, ascending; then comes the target.
        thetas, curves: how many start at the first rung.
        held_out: analytic methods that are measured again on the held-out half.
        reserve: evaluations kept for the held-out half.
    """

    rungs: tuple[int, ...]
    thetas: int
    curves: int
    held_out: int

    @property
    def reserve(self) -> int:
        return self.held_out + _CHOSEN + 1


def screening_lengths(native_len: int, target_len: int) -> tuple[int, ...]:
    """An eighth and a quarter of the target, but at least twice the native length.

    Below that a screening would measure what the model can do already.
    """
    lengths = {max(target_len // share, 2 * native_len) for share in (8, 4)}
    return tuple(sorted(length for length in lengths if length < target_len))


def least_budget(num_analytic: int, spent: int) -> int:
    """Evaluations without which there is nothing to search with."""
    return spent + 1 + num_analytic + _CHOSEN + 1 + 4


def make_plan(native_len: int, target_len: int, *, budget: int, num_analytic: int,
              spent: int) -> Plan:
    """Divide what the analytic methods leave of the budget."""
    free = budget - spent - 1 - num_analytic - _CHOSEN - 1
    held_out = min(num_analytic, free // 3)
    free -= held_out
    return Plan(rungs=screening_lengths(native_len, target_len),
                thetas=min(_MOST_THETAS, free // 6), curves=min(_MOST_CURVES, free // 4),
                held_out=held_out)


class Strategy:
    """One search.

    Args:
        spec: the model's own RoPE.
        judge: compares settings.
        merge_safe: spend more of the budget on settings that leave siblings alone.
    """

    def __init__(self, lab: Lab, spec: RopeSpec, target_len: int, analytic: Sequence[Candidate],
                 plan: Plan, judge: Judge, *, merge_safe: bool, seed: int):
        self.lab, self.spec, self.target_len, self.plan = lab, spec, target_len, plan
        self.analytic, self.judge, self.merge_safe = analytic, judge, merge_safe
        self.space = CurveSpace(spec.rotary_dim // 2, target_len / spec.original_len)
        self.rng = np.random.default_rng(seed)
        self.units: dict[str, np.ndarray] = {}
        self.native = native_candidate(spec)

    def run(self) -> dict[str, Result]:
        """Spend the budget; the settings chosen on the search half, after a check of them."""
        for candidate in (self.native, *self.analytic):
            self.lab.measure(candidate, self.target_len)
        try:
            self._search_thetas()
            self._search_curves()
            while self.lab.left > self.plan.reserve and self._try_next():
                pass
        except BudgetSpentError:
            logger.info("the budget is spent")
        chosen = choose(self.lab.results(self.target_len), self.judge)
        self._check(chosen)
        return chosen

    def _check(self, chosen: dict[str, Result]) -> None:
        """Measure what was chosen, and the analytic methods, on text and facts not seen so far."""
        ranked = sorted(self.analytic, key=lambda c: self._distance_to_front(c))
        best = best_analytic(self.lab.results(self.target_len), self.target_len).candidate
        wanted = [*(r.candidate for r in chosen.values()), self.native, best, *ranked]
        for candidate in wanted:
            if self.lab.left > 0:
                self.lab.measure(candidate, self.target_len, HELD_OUT)

    def _distance_to_front(self, candidate: Candidate) -> float:
        results = [self.lab.result(c) for c in self.analytic]
        scaled = self._scaled(results)
        own = self._scaled([self.lab.result(candidate)])[0]
        return float(Goal("", np.array([*scaled[:, :2].min(0), np.inf])).shortfall(own[None])[0])

    # ---- screening ------------------------------------------------------------------------------

    def _screen(self, candidates: list[Candidate], keep: int) -> list[Result]:
        """Successive halving: at each rung the better half goes on, `keep` reach the target."""
        for rung in self.plan.rungs:
            results = [self._within_budget(c, rung) for c in candidates]
            count = max(keep, len(candidates) // 2)
            if rung == self.plan.rungs[-1]:
                count = keep
            candidates = [candidates[i] for i in _rank(results, rung)[:count]]
        return [self._within_budget(c, self.target_len) for c in candidates]

    def _within_budget(self, candidate: Candidate, length: int) -> Result:
        known = self.lab.is_known(candidate, length)
        if not known and self.lab.left <= self.plan.reserve:
            raise BudgetSpentError
        return self.lab.measure(candidate, length)

    # ---- theta ----------------------------------------------------------------------------------

    def _search_thetas(self) -> None:
        """A log grid, then a golden-section search for the least needle loss."""
        if not self.plan.thetas:
            return
        growth = math.log(self.target_len / self.spec.original_len)
        low = math.log(self.spec.rope_theta) + 0.5 * growth
        step = 2.5 * growth / max(1, self.plan.thetas - 1)
        grid = [self._theta(low + i * step) for i in range(self.plan.thetas)]
        self._screen(grid, keep=max(1, self.plan.thetas // 3))
        plain = [r for r in self.lab.results(self.target_len)
                 if not r.candidate.rope.scaling and r.candidate.origin != "native"]
        best = min(plain, key=lambda r: float(r.point(self.target_len)[NEEDLE]))
        centre = math.log(best.candidate.rope.rope_theta)
        self._golden(centre - step, centre + step)

    def _theta(self, log_theta: float) -> Candidate:
        return theta_candidate(self.spec, self.target_len, math.exp(log_theta))

    def _golden(self, low: float, high: float) -> None:
        def loss(x: float) -> float:
            return float(self._within_budget(self._theta(x), self.target_len)
                         .point(self.target_len)[NEEDLE])

        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = loss(left), loss(right)
        for _ in range(_GOLDEN_STEPS - 2):
            if at_left <= at_right:
                high, right, at_right = right, left, at_left
                left = high - _GOLDEN * (high - low)
                at_left = loss(left)
            else:
                low, left, at_left = left, right, at_right
                right = low + _GOLDEN * (high - low)
                at_right = loss(right)

    # ---- curves ---------------------------------------------------------------------------------

    def _search_curves(self) -> None:
        points = halton(self.plan.curves, DIMENSIONS)
        self._screen([self._curve(np.array(p)) for p in points],
                     keep=max(1, self.plan.curves // 3))

    def _curve(self, unit: np.ndarray) -> Candidate:
        candidate = curve_candidate(self.spec, self.target_len, self.space.from_unit(unit))
        self.units[candidate.key] = unit
        return candidate

    def _try_next(self) -> bool:
        """Measure the curve that promises most for the goal whose turn it is.

        Returns:
            Whether there was one unlike all that were measured.
        """
        results = self.lab.results(self.target_len)
        scaled = self._scaled(results)
        goal = self._next_goal(results, scaled)
        near = self._near(results, goal.shortfall(scaled))
        units = np.concatenate([self._everywhere(), near])
        x = np.array([self._features(r.candidate) for r in results])
        pool = np.concatenate([self._cube_features, [self._features_of(unit) for unit in near]])
        guesses = np.stack([self._guess(x, scaled[:, axis], pool) for axis in range(3)], 1)
        shortfall = goal.shortfall(guesses)
        nearest = np.sqrt(((pool[:, None] - x[None]) ** 2).mean(-1)).min(1)
        shortfall[nearest < _SAME_FEATURES] = np.inf
        chosen = self._curve(units[int(shortfall.argmin())])
        if not np.isfinite(shortfall).any() or self.lab.is_known(chosen, self.target_len):
            logger.info("every curve is like one that was measured; the search ends early")
            return False
        self._within_budget(chosen, self.target_len)
        return True

    def _next_goal(self, results: list[Result], scaled: np.ndarray) -> Goal:
        analytic = np.array([r.candidate.origin == "analytic" for r in results])
        made = np.array([r.candidate.origin != "native" for r in results])
        offered = np.array([r.candidate.may_be_chosen for r in results])
        compromise = goal_compromise(scaled[made], analytic[made])
        safe = goal_merge_safe(scaled[offered], self.judge.reaching(
            [r for r in results if r.candidate.may_be_chosen]))
        turns = [compromise, goal_cover(scaled[made], analytic[made]) or compromise,
                 goal_gentle(scaled[made], analytic[made]), goal_needle(scaled[made]), safe]
        if self.merge_safe:
            turns += [safe, safe]
        return turns[len(results) % len(turns)]

    def _guess(self, x: np.ndarray, y: np.ndarray, pool: np.ndarray) -> np.ndarray:
        mean, deviation = fit(x, y).predict(pool)
        return mean - _OPTIMISM * deviation

    def _near(self, results: list[Result], shortfall: np.ndarray) -> np.ndarray:
        """Curves near the best and the front; [n, DIMENSIONS]."""
        order = np.argsort(shortfall)[:4].tolist()
        front = np.flatnonzero(on_front(np.array([r.point(self.target_len) for r in results])))
        parents = [self._unit(results[i].candidate) for i in dict.fromkeys([*order, *front])]
        picks = self.rng.integers(0, len(parents), _NEARBY)
        sizes = self.rng.choice([_STEP, _STEP / 4], (_NEARBY, 1))
        near = np.array(parents)[picks] + sizes * self.rng.standard_normal((_NEARBY, DIMENSIONS))
        return near.clip(0, 1)

    def _everywhere(self) -> np.ndarray:
        """Curves all over the cube; [n, DIMENSIONS]."""
        if not hasattr(self, "_cube"):
            self._cube = np.array(halton(_POOL, DIMENSIONS, skip=self.plan.curves))
            self._cube_features = np.array([self._features_of(unit) for unit in self._cube])
        return self._cube

    def _unit(self, candidate: Candidate) -> np.ndarray:
        """The point of the cube whose curve comes nearest to a candidate."""
        if candidate.key not in self.units:
            cube = self._everywhere()
            gaps = ((self._cube_features - self._features(candidate)) ** 2).sum(1)
            self.units[candidate.key] = cube[int(gaps.argmin())]
        return self.units[candidate.key]

    def _features(self, candidate: Candidate) -> np.ndarray:
        return features(self.spec, candidate.rope)

    def _features_of(self, unit: np.ndarray) -> np.ndarray:
        curve = self.space.from_unit(unit)
        return np.append(np.log(curve.factors(self.space.num_pairs)),
                         10 * math.log(curve.attention_factor))

    def _scaled(self, results: Sequence[Result]) -> np.ndarray:
        native = float(self.lab.result(self.native).point(self.target_len)[1])
        return Scale(native)(np.array([r.point(self.target_len) for r in results]))


def _rank(results: Sequence[Result], length: int) -> list[int]:
    """Indices from the least dominated on needle and short loss to the most; ties by needle."""
    points = np.array([r.point(length)[:2] for r in results])
    beaten = ((points[:, None] <= points[None]).all(-1)
              & (points[:, None] < points[None]).any(-1)).sum(0)
    return sorted(range(len(results)), key=lambda i: (beaten[i], points[i, NEEDLE]))
