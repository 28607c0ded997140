"""Every strategy on 1, 2, 3, 4 and 8 gloo ranks against attention written down in fp64.

Each world is started once and computes all cases; the parent puts the shards together and compares
whole tensors.
"""

import itertools
from typing import NamedTuple

import pytest
import torch

from extend.ring import LAYOUTS, unshard
from tests.ring.oracle import (
    DTYPES,
    MASKS,
    NAMES,
    exact,
    make_inputs,
    run_ring,
    tolerance,
)  # fmt: skip
from tests.spawn import spawn

WORLDS = [1, 2, 3, 4, 8]
STRATEGIES = {
    1: ["ring", "all-gather", "ulysses"],
    2: ["ring", "all-gather", "ulysses", "double-ring:2"],
    3: ["ring", "all-gather", "ulysses"],
    4: ["ring", "all-gather", "ulysses", "usp:2", "double-ring:2"],
    8: ["ring", "all-gather", "ulysses", "usp:2", "usp:4", "double-ring:2", "double-ring:4"],
}
HEADS = ("MHA", "GQA", "MQA")
KERNELS = ("reference", "flash_cpu")  # one that takes any tile, and one that takes few


class Case(NamedTuple):
    strategy: str
    layout: str
    kernel: str
    heads: str
    dtype: str
    mask: str


# Strategies that fewer ranks have run in every way; double-ring:2 on 2 ranks is one ring.
PAIRED = {3: STRATEGIES[3], 4: ["ring", "all-gather", "ulysses"], 8: STRATEGIES[8]}


def cases(world):
    """What to compute on `world` ranks.

    Strategies that are `PAIRED` still meet each layout with each kernel, and each mask, and each
    dtype with all heads: the ways to share the sequence out are those of fewer ranks, and all of
    them are run there.
    """
    of_six = "6 " if world == 3 else ""
    paired = PAIRED.get(world, [])
    whole = [strategy for strategy in STRATEGIES[world] if strategy not in paired]
    geometry = [*itertools.product(whole, LAYOUTS, KERNELS, MASKS)]
    geometry += [
        (strategy, list(LAYOUTS)[(i + j) % 3], KERNELS[(i + j // 3) % 2], mask)
        for i, strategy in enumerate(paired)
        for j, mask in enumerate(MASKS)
    ]
    numbers = [
        case for case in itertools.product(
            STRATEGIES[world], HEADS, ("bf16", "fp32"), ("causal", "window", "packed"))
        if case[0] in whole or case[-1] == "causal"
    ]  # fmt: skip
    found = [Case(s, lay, kernel, of_six + "GQA", "fp32", m) for s, lay, kernel, m in geometry]
    found += [Case(s, "zigzag", "flash_cpu", of_six + h, dtype, m) for s, h, dtype, m in numbers]
    found += [
        Case(s, "zigzag", "reference", of_six + "GQA", "fp64", m)
        for s in STRATEGIES[world] for m in ("causal", "packed window")
    ]  # fmt: skip
    return list(dict.fromkeys(found))


def run_cases(rank, world):
    return {
        case: run_ring(
            rank, world, make_inputs(case.heads, case.dtype), strategy=case.strategy,
            layout=case.layout, kernel=case.kernel, **MASKS[case.mask],
        )
        for case in cases(world)
    }  # fmt: skip


@pytest.fixture(scope="module")
def results():
    """world -> what each of its ranks computed; a world is started when it is first asked for."""
    return {}


@pytest.mark.parametrize(
    ("world", "strategy", "layout"),
    [(w, s, layout) for w in WORLDS for s in STRATEGIES[w] for layout in LAYOUTS],
)
def test_equals_attention_over_the_whole_sequence(results, world, strategy, layout):
    if world not in results:
        results[world] = spawn(world, run_cases)
    mine = [case for case in cases(world) if (case.strategy, case.layout) == (strategy, layout)]
    assert mine
    for case in mine:
        expected = exact(case.heads, case.dtype, case.mask)
        for i, name in enumerate(NAMES):
            parts = [of_rank[case][i] for of_rank in results[world]]
            assert all(part.dtype == DTYPES[case.dtype] for part in parts)
            torch.testing.assert_close(
                unshard(parts, 2, layout).double(), expected[i], rtol=0,
                atol=tolerance(name, case.heads, case.dtype, case.mask),
                msg=lambda text, name=name, case=case: f"{name} of {case}: {text}",
            )  # fmt: skip
