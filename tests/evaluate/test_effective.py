import math

import pytest

from extend.evaluate.effective import own_rule, ruler_rule, smallest
from extend.evaluate.score import (
    difference,
    difference_of_means,
    mean_of_tasks,
    proportion,
)


def by_length(n=100, **scores):
    """Keyword `k4=0.5`: half right at 4096."""
    return {str(1024 * int(key[1:])): proportion(score * n, n) for key, score in scores.items()}


@pytest.mark.parametrize(("scores", "length"), [
    ({"k4": 1.0, "k8": 0.85, "k16": 0.84}, 8192),  # at 85 % exactly it still counts
    ({"k4": 0.6, "k8": 0.51, "k16": 0.5}, 8192),  # 85 % of 0.6 is 0.51
    ({"k4": 1.0, "k8": 0.5, "k16": 1.0}, 4096),  # what comes back does not count
    ({"k4": 0.4, "k8": 1.0}, 8192), ({"k4": 0.0, "k8": 0.0}, 0)])
def test_own_rule_goes_to_the_first_length_below_its_share(scores, length):
    rule = own_rule(by_length(**scores), None)
    assert rule["length"] == length
    assert rule["reference_length"] == 4096 and rule["reference_score"] == scores["k4"]
    assert rule["threshold"] == pytest.approx(0.85 * scores["k4"], abs=1e-6)


def test_own_rule_by_the_lower_end_needs_prompts():
    few, many = (own_rule(by_length(n, k4=1.0, k8=1.0), None) for n in (20, 30))
    # With no mistake the lower end is 1 / (1 + z^2 / n): 0.839 of 20, 0.886 of 30.
    assert (few["length"], few["length_low"], few["n"]) == (8192, 0, 20)
    assert (many["length"], many["length_low"]) == (8192, 8192)


def test_own_rule_counts_nothing_that_guessing_reaches():
    found = by_length(20, k4=0.3, k8=0.3)
    assert found["4096"]["wilson_low"] < 0.2
    assert own_rule(found, 0.2) == {**own_rule(found, 0.0), "above_chance": False, "length": 0,
                                    "length_low": 0}
    assert own_rule(found, 0.0)["length"] == 8192


def test_smallest_names_the_task_that_limits():
    a, b = by_length(k4=1.0, k8=1.0), by_length(50, k4=1.0, k8=0.2)
    found = smallest({"a": own_rule(a, None), "b": own_rule(b, None)})
    assert (found["length"], found["limited_by"], found["n"]) == (4096, "b", 50)
    assert smallest({}) is None


def test_rulers_rule_is_on_the_mean_and_strict():
    tasks = {"vt": by_length(k4=1.0, k8=1.0, k16=1.0), "cwe": by_length(k4=0.72, k8=0.712, k16=0.9)}
    rule = ruler_rule(tasks)
    assert [entry["score"] for entry in rule["lengths"].values()] == [0.86, 0.856, 0.95]
    assert rule["length"] == 4096  # 85.6 % is not above 85.6 %, and 16K comes after a failure
    assert rule["length_low"] == 0
    assert (rule["tasks"], rule["of"], rule["threshold"]) == (["vt", "cwe"], 13, 0.856)
    assert ruler_rule({}) is None


def test_lengths_that_a_task_was_not_asked_at_have_no_mean():
    rule = ruler_rule({"vt": by_length(k4=1.0, k16=1.0), "cwe": by_length(k4=1.0, k8=0.1, k16=1.0)})
    assert list(rule["lengths"]) == ["4096", "16384"] and rule["not_asked_by_all"] == [8192]
    assert rule["length"] == 16384
    apart = ruler_rule({"vt": by_length(k4=1.0), "cwe": by_length(k8=1.0)})
    assert (apart["length"], apart["lengths"], apart["longest_asked"]) == (0, {}, 0)


def test_interval_of_a_mean():
    one = proportion(37, 50)
    assert mean_of_tasks([one]) == {**one, "tasks": 1}
    # Equal tasks: the half-widths of Wilson's interval shrink by the root of their number.
    four = mean_of_tasks([one] * 4)
    assert four["score"] - four["wilson_low"] == pytest.approx(
        (one["score"] - one["wilson_low"]) / 2, abs=2e-6)
    assert four["wilson_high"] - four["score"] == pytest.approx(
        (one["wilson_high"] - one["score"]) / 2, abs=2e-6)
    perfect = mean_of_tasks([proportion(5, 5)] * 2)
    assert perfect["n"] == 10 and perfect["wilson_high"] == 1.0
    assert perfect["wilson_low"] == pytest.approx(1 - (1 - 0.565518) / math.sqrt(2), abs=1e-5)


def test_differences():
    # Newcombe 1998, table II, method 10: 56/70 against 48/80.
    assert difference(proportion(56, 70), proportion(48, 80)) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=1e-4)
    # 10/10 against 0/10: "0.6075 to 1".
    assert difference(proportion(10, 10), proportion(0, 10)) == pytest.approx(
        (1.0, 0.6075, 1.0), abs=1e-4)
    assert difference_of_means(2.0, 0.3, 1.0, 0.4) == (1.0, pytest.approx(1.959964 * 0.5))
    assert difference_of_means(2.0, None, 1.0, 0.4) == (1.0, None)
