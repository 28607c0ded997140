"""Fronts against brute force; intervals against closed forms."""

import numpy as np
import pytest

from extend.search.front import Bootstrap, on_front, student_quantile, widen


def brute_force(points: np.ndarray) -> list[bool]:
    def dominates(a: np.ndarray, b: np.ndarray) -> bool:
        return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))

    return [not any(dominates(other, point) for other in points) for point in points]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_front_is_what_nothing_dominates(axes: int):
    rng = np.random.default_rng(axes)
    for _ in range(20):
        # Few levels, so that there are ties and repeated points.
        points = rng.integers(0, 6, (40, axes)).astype(float)
        assert on_front(points).tolist() == brute_force(points)


def test_equal_points_are_both_on_the_front():
    assert on_front(np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 2.0]])).tolist() == [True, True, False]


def test_the_spread_of_resampled_means_is_the_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 200)
    means = Bootstrap.of_items(200, draws=8000).means(values)
    # 8000 draws give a standard deviation to about 1 %.
    assert means.std() == pytest.approx(values.std() / 200 ** 0.5, rel=0.04)
    assert means.mean() == pytest.approx(values.mean(), abs=0.02)


def test_items_of_one_cluster_are_drawn_together():
    """20 clusters of 10 equal items say no more than 20 items."""
    levels = np.random.default_rng(1).normal(size=20)
    clusters = np.repeat(np.arange(20), 10).tolist()
    means = Bootstrap(clusters, [0] * 200, draws=8000).means(np.repeat(levels, 10))
    assert means.std() == pytest.approx(levels.std(ddof=1) / 20 ** 0.5, rel=0.04)


def test_strata_keep_their_share():
    """A difference between text and filler is no uncertainty."""
    means = Bootstrap([0, 0, 1, 1, 2, 2, 3, 3], ["a", "a", "b", "b", "a", "a", "b", "b"],
                      draws=500).means([1.0, 1, 5, 5, 1, 1, 5, 5])
    np.testing.assert_allclose(means, 3.0, rtol=1e-12)


def test_paired_differences_are_sharper_than_two_intervals():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 5, 100)
    first, second = shared, shared + 0.1 + rng.normal(0, 0.1, 100)
    bootstrap = Bootstrap.of_items(100)
    low, high = bootstrap.interval(second - first)
    assert 0.05 < low < 0.1 + 0.05 and high < 0.15
    assert bootstrap.interval(first)[1] > bootstrap.interval(second)[0]  # unpaired: they overlap


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = [low <= 1.0 <= high for low, high in (
        Bootstrap.of_items(40, draws=600, seed=i).interval(rng.exponential(1.0, 40))
        for i in range(300))]
    assert 0.88 <= np.mean(hits) <= 0.98  # percentile intervals of skewed data fall a little short


@pytest.mark.parametrize(("freedom", "expected"), [
    (1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (6, 2.4469), (10, 2.2281), (60, 2.0003)])
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float):
    assert student_quantile(freedom) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("clusters", "size", "strata", "least"), [
    (2, 1, 1, 0.87), (4, 1, 1, 0.9), (8, 1, 1, 0.9), (4, 16, 2, 0.9), (8, 16, 2, 0.9)])
def test_few_clusters_are_covered_too(clusters: int, size: int, strata: int, least: float):
    """Rows differ as much as the facts of a row do; the mean of all that could be drawn is 0."""
    rng = np.random.default_rng(clusters + size)
    owner = np.repeat(np.arange(clusters), size)
    bootstrap = Bootstrap(owner.tolist(), (owner % strata).tolist(), draws=500)
    hits = []
    for _ in range(400):
        values = rng.normal(size=clusters)[owner] + (size > 1) * rng.normal(size=len(owner))
        low, high = bootstrap.interval(values)
        hits.append(low <= 0 <= high)
    assert np.mean(hits) >= least
    assert bootstrap.num_clusters == clusters


def test_a_widened_interval_keeps_its_centre_and_its_shape():
    draws = np.linspace(-1, 3, 4001)[:, None] * np.array([1.0, 10.0])
    low, high = widen(draws, np.array([1.0, 10.0]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(low, [-0.9, 10 - 2 * 19.0], rtol=1e-9)
    np.testing.assert_allclose(high, [2.9, 10 + 2 * 19.0], rtol=1e-9)
