"""Every strategy on 1, 2, 3, 4 and 8 gloo ranks against attention written down in fp64.

Each world is started once and computes all cases; the parent puts the shards together and compares
whole tensors.
"""

import itertools

import pytest
import torch

from extend.ring import LAYOUTS, unshard
from tests.ring.oracle import (
    DTYPES, HEADS, MASKS, NAMES, exact, make_inputs, run_ring, tolerance,
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


def cases(world):
    """(strategy, layout, kernel, heads, dtype, mask)."""
    strategies = STRATEGIES[world]
    # Geometry: every layout and mask, on a kernel that takes any tile and one that takes few.
    found = list(itertools.product(
        strategies, LAYOUTS, ("reference", "flash_cpu"), ("GQA",), ("fp32",), MASKS))
    # Numbers: every ratio of heads and dtype.
    found += itertools.product(
        strategies, ("zigzag",), ("flash_cpu",), HEADS, ("bf16", "fp32"),
        ("causal", "window", "packed"))
    found += itertools.product(
        strategies, ("zigzag",), ("reference",), ("GQA",), ("fp64",), ("causal", "packed window"))
    return list(dict.fromkeys(found))


def run_cases(rank, world):
    return {
        case: run_ring(
            rank, world, make_inputs(heads, dtype), strategy=strategy, layout=layout,
            kernel=kernel, **MASKS[mask],
        )
        for case in cases(world)
        for strategy, layout, kernel, heads, dtype, mask in [case]
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
    mine = [c for c in cases(world) if c[0] == strategy and c[1] == layout]
    assert mine
    for case in mine:
        _, _, _, heads, dtype, mask = case
        for i, name in enumerate(NAMES):
            parts = [of_rank[case][i] for of_rank in results[world]]
            assert all(part.dtype == DTYPES[dtype] for part in parts)
            torch.testing.assert_close(
                unshard(parts, 2, layout).double(), exact(heads, dtype, mask)[i], rtol=0,
                atol=tolerance(name, heads, dtype, mask),
                msg=lambda text, name=name, case=case: f"{name} of {case}: {text}",
            )  # fmt: skip
