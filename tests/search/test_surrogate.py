"""The Gaussian process against its closed form and a function it must learn."""

import numpy as np

from extend.search.surrogate import fit


def test_it_returns_to_the_measured_values():
    x = np.linspace(0, 1, 12)[:, None]
    y = np.sin(5 * x[:, 0])
    mean, deviation = fit(x, y).predict(x)
    np.testing.assert_allclose(mean, y, atol=0.02)
    far = fit(x, y).predict(np.array([[30.0]]))
    np.testing.assert_allclose(far[0], y.mean(), atol=1e-6)  # nothing is known there
    np.testing.assert_allclose(far[1], y.std(), rtol=1e-6)
    assert (deviation < far[1]).all()


def test_it_predicts_between_measurements():
    rng = np.random.default_rng(0)
    x = rng.random((60, 2))
    y = x[:, 0] ** 2 + np.cos(3 * x[:, 1])
    new = rng.random((50, 2)) * 0.8 + 0.1
    mean, _ = fit(x, y).predict(new)
    assert np.abs(mean - (new[:, 0] ** 2 + np.cos(3 * new[:, 1]))).max() < 0.05


def test_equal_values_and_equal_points_do_not_break_it():
    mean, _ = fit(np.zeros((3, 2)), np.ones(3)).predict(np.ones((2, 2)))
    np.testing.assert_allclose(mean, 1.0)
