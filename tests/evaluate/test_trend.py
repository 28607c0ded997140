import math

import numpy as np
import pytest

from extend.evaluate.trend import BLOCK, Trend, fit_trend, mean_of_windows, t_quantile

X = np.log2(1 + np.arange(8 * BLOCK + 100) / 1000)


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 12, 100])
def test_quantiles_of_t_leave_a_twentieth(degrees):
    edge = t_quantile(degrees)
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    t = np.linspace(-edge, edge, 200_001)
    inside = np.trapezoid(scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2), t)
    assert inside == pytest.approx(0.95, abs=3e-4)  # what the expansion leaves out at 3 degrees


def test_slope_of_windows_is_the_mean_of_their_slopes():
    rng = np.random.default_rng(0)
    y = 3 + np.array([[0.1], [0.3], [0.2]]) * X + rng.normal(size=(3, 1))
    trend = fit_trend(X, y)
    assert trend.slope == pytest.approx(0.2)
    assert trend.stderr == pytest.approx(0.1 / math.sqrt(3))
    assert (trend.degrees, trend.direction) == (2, "flat")  # 0.2 < 4.303 * 0.0577
    assert fit_trend(X, y[[1, 2]] - 0.5 * X).direction == "flat"  # two slopes say little
    assert fit_trend(X, 3 + np.array([[0.19], [0.2], [0.21]]) * X).direction == "rises"
    assert fit_trend(X, 3 - np.array([[0.19], [0.2], [0.21]]) * X).direction == "falls"


def test_error_of_one_window_covers_losses_that_depend_on_their_neighbours():
    rng, slopes, errors, means, mean_errors = np.random.default_rng(0), [], [], [], []
    for _ in range(400):
        noise = np.repeat(rng.normal(size=len(X) // 64 + 1), 64)[:len(X)]
        trend = fit_trend(X, (2 + 0.1 * X + noise)[None])
        mean, error = mean_of_windows(noise[None])
        slopes.append(trend.slope)
        errors.append(trend.stderr)
        means.append(mean)
        mean_errors.append(error)
    # 400 draws tell a standard deviation to 3.5 %; eight blocks know theirs to a fourth.
    assert np.mean(slopes) == pytest.approx(0.1, abs=3 * np.std(slopes) / 20)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(slopes), rel=0.15)
    assert np.sqrt(np.mean(np.square(mean_errors))) == pytest.approx(np.std(means), rel=0.15)


def test_too_little_is_said_to_be_unknown():
    assert fit_trend(X[:2 * BLOCK], X[None, :2 * BLOCK]).stderr is None
    assert fit_trend(np.zeros(5), np.ones((3, 5))) == Trend(0.0, None, 0)
    assert Trend(1.0, None, 0).direction == "unknown"
    assert mean_of_windows(np.ones((1, BLOCK + 1))) == (1.0, None)


def test_constant_losses_are_flat():
    assert fit_trend(X, np.full((3, len(X)), 5.99)).direction == "flat"
