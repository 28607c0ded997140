"""The search on a function whose best is known: budget, order, repeatability, what it finds."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extend.errors import CompatibilityError
from extend.model_config import RopeSpec
from extend.search import strategy as strategy_module
from extend.search.candidates import Candidate, analytic_candidates
from extend.search.data import HELD_OUT, SEARCH
from extend.search.front import Bootstrap
from extend.search.goals import Judge, best_analytic, choose
from extend.search.lab import BudgetSpentError, Lab, Result
from extend.search.store import EvaluationStore
from extend.search.strategy import Strategy, least_budget, make_plan, screening_lengths
from tests.search.fake import ITEMS, SPEC, TARGET_LEN, FakeMeter

NUM_ANALYTIC = len(analytic_candidates(SPEC, TARGET_LEN)[0])


def make_lab(path: Path, meter: FakeMeter, budget: int = 60) -> Lab:
    return Lab(meter, EvaluationStore(path, {"fake": 1}), budget=budget, spent=1)


def run(lab: Lab, *, merge_safe: bool = False, seed: int = 0) -> dict[str, Result]:
    plan = make_plan(SPEC.original_len, TARGET_LEN, budget=lab.budget, num_analytic=NUM_ANALYTIC,
                     spent=lab.spent)
    judge = Judge(TARGET_LEN, None, Bootstrap.of_items(ITEMS, draws=300),
                  Bootstrap.of_items(ITEMS, draws=300))
    return Strategy(lab, SPEC, TARGET_LEN, analytic_candidates(SPEC, TARGET_LEN)[0], plan, judge,
                    merge_safe=merge_safe, seed=seed).run()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeMeter, Lab, dict[str, Result]]:
    """A finished search of 60 evaluations; never changed."""
    meter = FakeMeter()
    lab = make_lab(tmp_path_factory.mktemp("done") / "e.jsonl", meter)
    return meter, lab, run(lab)


@pytest.mark.parametrize(("native", "target", "expected"), [
    (8192, 131072, (16384, 32768)), (8192, 1048576, (131072, 262144)), (8192, 65536, (16384,)),
    (8192, 32768, (16384,)), (8192, 16384, ()), (256, 2048, (512,))])
def test_screening_starts_beyond_the_native_length(native, target, expected):
    assert screening_lengths(native, target) == expected


@pytest.mark.parametrize("budget", [least_budget(NUM_ANALYTIC, 1), 40, 60, 80])
def test_the_budget_is_never_exceeded(tmp_path: Path, budget: int):
    meter = FakeMeter()
    lab = make_lab(tmp_path / "e.jsonl", meter, budget)
    chosen = run(lab)
    measured = [call for call in meter.calls if call[0] == "needle"]
    assert len(measured) + lab.spent == lab.used <= budget
    assert lab.used >= budget - 3  # chosen settings that coincide are checked once
    plan = make_plan(SPEC.original_len, TARGET_LEN, budget=budget, num_analytic=NUM_ANALYTIC,
                     spent=lab.spent)
    searched = sum(e.split == SEARCH for e in lab.evaluations())
    assert searched == budget - lab.spent - plan.reserve
    best = best_analytic(lab.results(TARGET_LEN), TARGET_LEN)
    assert best.candidate.key in {r.candidate.key for r in lab.results(TARGET_LEN, HELD_OUT)}
    checked = [r for r in lab.results(TARGET_LEN, HELD_OUT) if r.candidate.origin == "analytic"]
    assert len(checked) >= plan.held_out
    halves = {result.candidate.key for result in lab.results(TARGET_LEN, HELD_OUT)}
    assert {result.candidate.key for result in chosen.values()} <= halves
    assert len(lab.results(TARGET_LEN, SEARCH)) >= NUM_ANALYTIC + 1


def test_short_text_is_measured_once_for_a_candidate_and_half(done):
    meter, lab, _ = done
    pairs = {(e.candidate["key"], e.split) for e in lab.evaluations()}
    assert sum(call[0] == "short" for call in meter.calls) == len(pairs) < lab.used


def test_a_search_that_was_killed_ends_like_one_that_was_not(done, tmp_path: Path):
    _, whole, expected = done
    for stop in (7, 20, 23, 45):
        path = tmp_path / f"{stop}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            run(make_lab(path, FakeMeter(fail_after=stop)))
        before = len(EvaluationStore(path, {"fake": 1}))
        meter = FakeMeter()
        lab = make_lab(path, meter)
        found = run(lab)
        assert {n: r.candidate.key for n, r in found.items()} == {
            n: r.candidate.key for n, r in expected.items()}
        again = [(e.candidate["key"], e.length, e.split) for e in lab.evaluations()]
        assert again == [(e.candidate["key"], e.length, e.split) for e in whole.evaluations()]
        assert sum(call[0] == "needle" for call in meter.calls) == len(again) - before


def test_a_finished_search_measures_nothing_again(done, tmp_path: Path):
    meter = FakeMeter()
    run(make_lab(shutil.copy(done[1].store.path, tmp_path / "e.jsonl"), meter))
    assert meter.calls == []


def test_it_finds_a_setting_no_worse_than_every_analytic_method(done):
    """The stand-in has one; 60 evaluations in all must do."""
    _, lab, chosen = done
    for split in (SEARCH, HELD_OUT):
        own = lab.result(chosen["compromise"].candidate, split).point(TARGET_LEN)[:2]
        methods = [r.point(TARGET_LEN)[:2] for r in lab.results(TARGET_LEN, split)
                   if r.candidate.origin == "analytic"]
        assert len(methods) == NUM_ANALYTIC
        assert all((own <= point + 1e-3).all() for point in methods)


def test_the_merge_safe_setting_reaches_the_target_and_disturbs_least(tmp_path: Path):
    lab = make_lab(tmp_path / "e.jsonl", FakeMeter())
    chosen = run(lab, merge_safe=True)
    offered = [r for r in lab.results(TARGET_LEN) if r.candidate.origin != "native"
               and r.candidate.method != "proportional"]
    needle = np.array([r.point(TARGET_LEN)[0] for r in offered])
    best = offered[int(needle.argmin())]
    bootstrap = Bootstrap.of_items(ITEMS, draws=300)
    reaching = [r for r in offered if r.point(TARGET_LEN)[0] <= needle.min() + 0.05
                and bootstrap.interval(np.subtract(r.needle[TARGET_LEN],
                                                   best.needle[TARGET_LEN]))[0] <= 0]
    expected = min(reaching, key=lambda r: r.disturbance)
    assert chosen["merge-safe"].candidate.key == expected.candidate.key
    assert chosen["needle"].candidate.key == best.candidate.key
    assert chosen["merge-safe"].disturbance <= chosen["needle"].disturbance


def test_a_threshold_widens_what_reaches_the_target(done):
    _, lab, _ = done
    offered = lab.results(TARGET_LEN)
    boot = Bootstrap.of_items(ITEMS, draws=300)
    strict = Judge(TARGET_LEN, None, boot, boot).reaching(offered)
    limit = float(np.median([r.point(TARGET_LEN)[0] for r in offered]))
    wide = Judge(TARGET_LEN, limit, boot, boot).reaching(offered)
    expected = [s or r.point(TARGET_LEN)[0] <= limit for s, r in zip(strict, offered)]
    assert wide.tolist() == expected and wide.sum() > strict.sum() >= 1


def test_matches_count_methods_that_are_no_better_on_both_axes(tmp_path: Path):
    """Without noise every resample gives the same points, so the count is exact."""
    lab = make_lab(tmp_path / "e.jsonl", FakeMeter(noise=0.0))
    run(lab)
    offered = lab.results(TARGET_LEN)
    methods = [r for r in offered if r.candidate.origin == "analytic"]
    boot = Bootstrap.of_items(ITEMS, draws=50)
    found = Judge(TARGET_LEN, None, boot, boot).matches(offered, methods)
    points = [r.point(TARGET_LEN)[:2] for r in offered]
    expected = [sum(bool((point <= m.point(TARGET_LEN)[:2] + 1e-3).all()) for m in methods)
                for point in points]
    np.testing.assert_allclose(found, expected)


def test_an_evaluation_beyond_the_budget_is_refused(tmp_path: Path):
    lab = make_lab(tmp_path / "e.jsonl", FakeMeter(), budget=3)
    first, second, third, *_ = analytic_candidates(SPEC, TARGET_LEN)[0]
    lab.measure(first, TARGET_LEN)
    lab.measure(second, TARGET_LEN)
    lab.measure(first, TARGET_LEN)  # known: costs nothing
    with pytest.raises(BudgetSpentError):
        lab.measure(third, TARGET_LEN)


def test_a_loss_that_is_no_number_is_named(tmp_path: Path):
    meter = FakeMeter()
    meter.short = lambda rope, split: ([float("nan")] * ITEMS, [0.0] * ITEMS)
    lab = make_lab(tmp_path / "e.jsonl", meter)
    with pytest.raises(CompatibilityError, match=r"ntk: a loss at 8192 tokens is not finite"):
        lab.measure(next(c for c in analytic_candidates(SPEC, TARGET_LEN)[0] if c.name == "ntk"),
                    TARGET_LEN)
    assert len(lab.store) == 0


class ThetaMeter(FakeMeter):
    """Needle loss is least at theta 1e6."""

    def needle(self, rope: RopeSpec, length: int, split: str) -> list[float]:
        self.calls.append(("needle", length, split))
        return [0.1 + (np.log(rope.rope_theta) - np.log(1e6)) ** 2] * ITEMS


def test_thetas_close_in_on_the_least_needle_loss(tmp_path: Path):
    lab = make_lab(tmp_path / "e.jsonl", ThetaMeter())
    plan = make_plan(SPEC.original_len, TARGET_LEN, budget=60, num_analytic=0, spent=1)
    judge = Judge(TARGET_LEN, None, Bootstrap.of_items(ITEMS), Bootstrap.of_items(ITEMS))
    strategy = Strategy(lab, SPEC, TARGET_LEN, [], plan, judge, merge_safe=False, seed=0)
    strategy._golden(np.log(1e5), np.log(1e8))
    visited = [r.candidate.rope.rope_theta for r in lab.results(TARGET_LEN)]
    # By hand: the golden ratio cuts [5, 8] (log10) at 6.146 and 6.854; the least is left of the
    # second, so [5, 6.854] is cut at 5.708, and then [5.708, 6.854] at 6.416.
    np.testing.assert_allclose(np.log10(visited), [6.146, 6.854, 5.708, 6.416], atol=1e-3)


def make_result(name: str, needle: float, short: float, siblings: float) -> Result:
    """A result whose items are all alike, so that every resample says the same."""
    origin = "native" if name == "unchanged" else "analytic" if name.startswith("a") else "curve"
    candidate = Candidate(name, origin, replace(SPEC, scaling={"rope_type": name}), None, {})
    return Result(candidate, {TARGET_LEN: [needle] * ITEMS}, [short] * ITEMS, [0.0] * ITEMS,
                  {"one": [siblings] * ITEMS})


def test_of_settings_that_match_all_methods_the_least_product_is_the_compromise():
    boot = Bootstrap.of_items(ITEMS, draws=20)
    results = [make_result("unchanged", 9.0, 3.0, 0.0), make_result("a1", 1.0, 3.5, 1.0),
               make_result("a2", 2.0, 3.2, 1.0), make_result("one axis", 0.3, 3.4, 0.9),
               make_result("wide", 0.80, 3.15, 0.8), make_result("close", 0.82, 3.10, 0.7),
               make_result("sharp", 0.99, 3.19, 0.6)]
    chosen = choose(results, Judge(TARGET_LEN, None, boot, boot))
    assert {n: r.candidate.name for n, r in chosen.items()} == {
        "needle": "one axis", "compromise": "close", "merge-safe": "one axis"}


def test_a_search_ends_when_every_curve_was_measured(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(strategy_module, "_SAME_FEATURES", 1e9)
    lab = make_lab(tmp_path / "e.jsonl", FakeMeter())
    chosen = run(lab)
    assert lab.used < lab.budget and set(chosen) >= {"needle", "compromise", "merge-safe"}


def test_what_engines_cannot_read_is_measured_and_never_chosen():
    boot = Bootstrap.of_items(ITEMS, draws=20)
    results = [make_result("unchanged", 9.0, 3.0, 0.0), make_result("a1", 1.0, 3.5, 1.0),
               make_result("proportional", 0.1, 3.0, 0.0)]
    results[2] = replace(results[2], candidate=replace(results[2].candidate, origin="analytic"))
    judge = Judge(TARGET_LEN, None, boot, boot)
    assert {r.candidate.name for r in choose(results, judge).values()} == {"a1"}
    assert best_analytic(results, TARGET_LEN).candidate.name == "a1"


def test_a_loss_that_is_not_surely_worse_but_farther_than_the_margin_does_not_reach():
    """Alternating items: the difference is noise of 1 nat, so its interval holds 0."""
    boot = Bootstrap.of_items(ITEMS, draws=300)
    best = make_result("a1", 1.0, 3.5, 1.0)
    noisy = [replace(best, needle={TARGET_LEN: [1.0 + mean + (-1) ** i for i in range(ITEMS)]})
             for mean in (0.04, 0.06)]
    for result in noisy:
        assert boot.interval(np.subtract(result.needle[TARGET_LEN], 1.0))[0] < 0
    judge = Judge(TARGET_LEN, None, boot, boot)
    assert judge.reaching([best, *noisy]).tolist() == [True, True, False]
    assert judge.limit == 1.5 and Judge(TARGET_LEN, 0.3, boot, boot).limit == 0.3
