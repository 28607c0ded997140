import pytest

from extend.evaluate.score import proportion
from extend.evaluate.summary import effective_length, summarize


def row(name="passkey", length=512, correct=5, n=5, **other):
    return {"task": "passkey", "name": name, "length": length, "depth": 0.5, "control": None,
            "beyond_native": length is not None and length > 1024, "correct": correct,
            **proportion(correct, n), **other}


def test_trials_are_pooled_over_depths():
    rows = [row(correct=5), row(correct=2), row(length=2048, correct=0),
            row(correct=1, control="no-needle", depth=None),
            row("json", None, 9, 10, task="exact-match", depth=None),
            {"task": "loss", "name": "prose", "length": 2048, "depth": None, "control": None,
             "loss": 2.5, "stderr": 0.1, "n": 4, "tokens": 8188, "score": None}]
    summary = summarize(rows)
    task = summary["tasks"]["passkey"]
    assert task["lengths"] == {"512": {**proportion(7, 10), "beyond_native": False},
                               "2048": {**proportion(0, 5), "beyond_native": True}}
    assert task["controls"] == {"no-needle": {"length": 512, **proportion(1, 5)}}
    assert summary["skills"] == {"json": proportion(9, 10)}
    assert summary["losses"] == {"prose": {"loss": 2.5, "stderr": 0.1, "n": 4, "tokens": 8188,
                                           "length": 2048}}


@pytest.mark.parametrize(("scores", "expected"), [
    ({512: 1.0, 1024: 0.85, 2048: 0.84}, 1024), ({512: 0.8, 1024: 1.0}, 0),
    ({512: 1.0, 1024: 0.5, 2048: 1.0}, 512), ({}, 0)])
def test_effective_length_stops_at_the_first_failure(scores, expected):
    assert effective_length({str(n): {"score": s} for n, s in scores.items()}) == expected


def test_effective_length_is_the_weakest_tasks():
    rows = [row("a", 512), row("a", 1024), row("b", 512), row("b", 1024, correct=2)]
    assert summarize(rows)["effective_length"] == 512
    assert summarize(rows[:2])["effective_length"] == 1024
    assert summarize([])["effective_length"] is None
