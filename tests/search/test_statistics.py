"""Intervals of whole settings: what stands behind them, and that short KL has one."""

import logging
from pathlib import Path

import numpy as np
import pytest

from extend.search.data import SEARCH, Sizes, build_splits
from extend.search.front import Bootstrap
from extend.search.lab import Result
from extend.search.session import _warn_of_few, default_rows
from extend.search.statistics import Statistics
from tests.search.test_strategy import make_result
from tests.tiny_text import make_text, make_tokenizer

LENGTH = 1024


def data_of(tmp_path: Path, rows: int, windows: int):
    path = tmp_path / "text.txt"
    path.write_text(make_text(600))
    sizes = Sizes(rows=rows, needles=3, short_tokens=512 * windows, sibling_tokens=1000)
    return build_splits(make_tokenizer("bytes-bos"), path, {"own": None}, native_len=512,
                        target_len=LENGTH, sizes=sizes, seed=0)[SEARCH]


def result_of(seed: int, rows: int, windows: int) -> Result:
    rng = np.random.default_rng(seed)
    return Result(make_result("a", 0, 0, 0).candidate, {LENGTH: rng.random(3 * rows).tolist()},
                  rng.random(windows).tolist(), rng.random(windows).tolist(),
                  {"one": rng.random(7).tolist(), "two": rng.random(5).tolist()})


def test_clusters_are_rows_and_windows(tmp_path: Path):
    found = Statistics(data_of(tmp_path, 8, 6), LENGTH, result_of(0, 8, 6))
    assert found.clusters == {"needle": 8, "short": 6, "siblings": 5, "short_kl": 6}


def test_short_kl_and_its_difference_have_intervals(tmp_path: Path):
    first, second = result_of(1, 8, 6), result_of(2, 8, 6)
    found = Statistics(data_of(tmp_path, 8, 6), LENGTH, first)
    bootstrap = Bootstrap.of_items(6, seed=1)
    for told, values in ((found.describe(first), first.short_kl),
                         (found.difference(first, second),
                          np.subtract(first.short_kl, second.short_kl))):
        low, high = bootstrap.interval(values)
        assert told["short_kl"] == pytest.approx(
            {"mean": np.mean(values), "low": low, "high": high}, rel=1e-9)
        assert low < np.mean(values) < high


def test_intervals_of_needle_loss_are_widened(tmp_path: Path):
    """8 rows in two strata: 6 degrees of freedom."""
    result = result_of(1, 8, 6)
    found = Statistics(data_of(tmp_path, 8, 6), LENGTH, result)
    told = found.describe(result)["needle"]
    low, high = np.percentile(found.draws(result)[:, 0], [2.5, 97.5])
    assert (told["high"] - told["low"]) / (high - low) == pytest.approx(2.447 / 1.96, rel=1e-3)


@pytest.mark.parametrize(("target_len", "needles", "expected"), [
    (16384, 16, 16), (32768, 16, 16), (65536, 16, 8), (1 << 20, 16, 8), (1024, 1, 32),
    (65536, 1, 16)])
def test_eight_rows_are_the_least(target_len: int, needles: int, expected: int):
    assert default_rows(target_len, needles) == expected


def test_few_rows_and_windows_are_told(tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING):
        _warn_of_few(data_of(tmp_path, 4, 4))
        assert not caplog.records
        _warn_of_few(data_of(tmp_path, 3, 4))
    assert "only 3 rows with hidden facts (give rows, --rows): intervals rest on fewer than 4" in (
        caplog.text)
