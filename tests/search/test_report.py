"""What a report says of settings whose losses are known."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from extend.search.candidates import analytic_candidates
from extend.search.data import SEARCH
from extend.search.lab import Lab
from extend.search.report import Outcome
from extend.search.statistics import Statistics
from tests.search.fake import ITEMS, SPEC, TARGET_LEN, FakeMeter
from tests.search.test_strategy import make_lab, run

ROWS = 8


def data() -> SimpleNamespace:
    """The rows that the stand-in's items belong to."""
    row = [SimpleNamespace(answers=[None] * (ITEMS // ROWS), source=source)
           for source in ("text", "filler")]
    return SimpleNamespace(rows=lambda length: row * (ROWS // 2))


def outcome_of(lab: Lab, chosen: dict, limit: float = 1.5) -> Outcome:
    statistics = Statistics(data(), TARGET_LEN, lab.results(TARGET_LEN)[0])
    return Outcome(lab, TARGET_LEN, chosen, {SEARCH: statistics}, limit)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = make_lab(tmp_path / "e.jsonl", FakeMeter())
    run(lab)
    return lab


def test_a_chosen_method_is_not_counted_as_matching_itself(lab: Lab):
    methods = analytic_candidates(SPEC, TARGET_LEN)[0]
    chosen = {"needle": lab.result(methods[0]), "compromise": next(
        r for r in lab.results(TARGET_LEN) if r.candidate.origin == "curve")}
    outcome = outcome_of(lab, chosen)
    verdict = outcome.verdict(SEARCH)
    assert verdict["analytic_methods"] == len(methods)
    assert verdict["needle"]["others"] == len(methods) - 1
    assert verdict["compromise"]["others"] == len(methods)
    own = chosen["needle"].point(TARGET_LEN)[:2]
    assert verdict["needle"]["matched"] == sum(
        bool((own <= lab.result(m).point(TARGET_LEN)[:2] + 1e-3).all()) for m in methods[1:])
    assert methods[0].name not in outcome.comparison(SEARCH)["needle"]


def test_it_says_whether_any_setting_reaches_the_target(lab: Lab):
    chosen = {"needle": min((r for r in lab.results(TARGET_LEN) if r.candidate.may_be_chosen),
                            key=lambda r: r.point(TARGET_LEN)[0])}
    least = chosen["needle"].point(TARGET_LEN)[0]
    for limit, reached in ((least, True), (least * 0.999, False)):
        assert outcome_of(lab, chosen, limit).reached() == {
            "any": reached, "least_needle_loss": least, "limit": limit}
