import math

import pytest

from extend.evaluate.score import mean_and_error, proportion, wilson_interval

Z = 1.959963984540054


@pytest.mark.parametrize(("n", "low"), [
    # With no failure the interval is [1 / (1 + z^2 / n), 1].
    (1, 0.206549), (2, 0.342380), (5, 0.565518), (10, 0.722467), (50, 0.928652), (100, 0.963007)])
def test_all_right(n, low):
    assert wilson_interval(n, n) == (pytest.approx(low, abs=1e-6), 1.0)
    assert low == pytest.approx(1 / (1 + Z * Z / n), abs=1e-6)
    assert wilson_interval(0, n) == (0.0, pytest.approx(1 - low, abs=1e-6))


@pytest.mark.parametrize(("successes", "n"), [(1, 2), (3, 7), (49, 50), (50, 100)])
def test_ends_solve_the_equation_of_the_score_test(successes, n):
    # Each end p satisfies |k/n - p| = z sqrt(p (1 - p) / n).
    for end in wilson_interval(successes, n):
        assert abs(successes / n - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n))


def test_proportion_and_mean():
    assert proportion(1, 2) == {
        "score": 0.5, "n": 2, "wilson_low": pytest.approx(0.094531, abs=1e-6),
        "wilson_high": pytest.approx(0.905469, abs=1e-6)}
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    assert mean_and_error([1.5]) == (1.5, None)
