"""The rules by which modules get their ranks."""

import pytest
import torch

from extend.adapter.rank import RankRule, even_rank, noise_limit, ranks_within
from extend.delta.noise import Noise
from extend.errors import RecipeError

SHAPES = {"a": (10, 20), "b": (40, 60), "c": (10, 20)}
VALUES = {"a": torch.tensor([9.0, 5.0, 4.0, 0.5]), "b": torch.tensor([6.0, 3.0, 1.0]),
          "c": torch.tensor([0.2, 0.1])}


def spent(ranks: dict[str, int], element_bytes: int = 4) -> int:
    return sum(element_bytes * rank * sum(SHAPES[name]) for name, rank in ranks.items())


@pytest.mark.parametrize(("num_bytes", "expected"), [
    (640, {"a": 1, "b": 1, "c": 1}), (759, {"a": 1, "b": 1, "c": 1}),
    (760, {"a": 2, "b": 1, "c": 1}), (880, {"a": 3, "b": 1, "c": 1}),
    (1279, {"a": 3, "b": 1, "c": 1}), (1280, {"a": 3, "b": 2, "c": 1}),
    (1679, {"a": 3, "b": 2, "c": 1}), (10_000, {"a": 4, "b": 3, "c": 2})])
def test_budget_goes_to_the_largest_values(num_bytes, expected):
    """A rank costs 120 bytes in a and c, 400 in b; the values fall 5, 4, 3, 1, 0.5, 0.1."""
    ranks = ranks_within(VALUES, SHAPES, num_bytes, 4)
    assert ranks == expected
    assert spent(ranks) <= num_bytes


def test_one_height_parts_the_kept_values_from_the_rest():
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(30, generator=generator).sort(descending=True).values
              for name in SHAPES}
    for num_bytes in range(700, 20_000, 777):
        ranks = ranks_within(values, SHAPES, num_bytes, 4)
        kept = [float(x) for name, rank in ranks.items() for x in values[name][1:rank]]
        left = [float(x) for name, rank in ranks.items() for x in values[name][rank:]]
        assert min(kept, default=1.0) >= max(left, default=0.0)
        assert spent(ranks) <= num_bytes


def test_budget_below_rank_one_is_refused():
    with pytest.raises(RecipeError, match=r"leaves 600 bytes.*rank 1 of 3 modules takes 640.*at "
                                          r"least 40 bytes more"):
        ranks_within(VALUES, SHAPES, 600, 4)


def test_even_rank():
    assert even_rank(SHAPES.values(), 640 * 7 + 1, 4) == 7
    assert even_rank(SHAPES.values(), 1, 4) == 1


@pytest.mark.parametrize(("options", "name"), [
    ({}, "noise"), ({"rank": 8}, "fixed"), ({"energy": 0.5}, "energy"),
    ({"adapter_bytes": 10}, "bytes")])
def test_names(options, name):
    assert RankRule(**options).name == name


@pytest.mark.parametrize(("options", "message"), [
    ({"rank": 8, "energy": 0.9}, "rank is 8 and energy is 0.9; give one"),
    ({"rank": 8, "adapter_bytes": 9}, "rank is 8 and adapter_bytes is 9; give one"),
    ({"adapter_bytes": 0}, "adapter_bytes is 0"), ({"adapter_bytes": 1e6}, "is 1000000.0"),
    ({"rank": 0}, "rank is 0"), ({"energy": 1.5}, "energy is 1.5")])
def test_options_out_of_range(options, message):
    with pytest.raises(RecipeError, match=message):
        RankRule(**options)


@pytest.mark.parametrize(("dtype", "shape", "limit"), [
    ("F32", (600, 700), 32), ("F64", (9000, 9000), 32), ("F32", (8, 8), 32),
    ("BF16", (600, 700), 161), ("F16", (4096, 14336), 512), ("BF16", (64, 64), 32)])
def test_limits_of_the_noise_rule(dtype, shape, limit):
    """161 (600 + 700) is the last multiple of 1300 below half of 600 x 700."""
    assert noise_limit(dtype, *shape) == limit


@pytest.mark.parametrize(("dtype", "limit"), [("F32", 32), ("BF16", 161)])
def test_noise_rule_takes_what_is_above_the_edge_up_to_a_limit(dtype, limit):
    delta = torch.zeros(600, 700)
    delta.diagonal()[:580] = torch.linspace(10, 5, 580)
    for edge, above in ((9.9, 12), (1e3, 1), (1.0, limit)):
        factors = RankRule(exact=True).factorize("w", delta, Noise(0.0, edge, 0.0), dtype, 1)
        assert len(factors.values) == above


def test_bytes_rule_looks_as_far_as_it_is_told():
    delta = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    rule = RankRule(adapter_bytes=1000)
    assert len(rule.factorize("w", delta, Noise(0.0, 0.0, 0.0), "F32", 7).values) == 7
