import pytest
import torch

from extend.ring.balance import imbalance, visible_pairs
from extend.ring.layouts import LAYOUTS
from extend.ring.mask import Mask
from tests.ring.oracle import visible

SEQ_LEN, WORLD = 48, 4
MASKS = [
    Mask(),
    Mask(causal=False),
    Mask(window=5),
    Mask(cu_seqlens=(0, 3, 20, 21, 48)),
    Mask(window=4, cu_seqlens=(0, 3, 20, 48)),
    Mask(causal=False, cu_seqlens=(0, 30, 48)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_pairs_are_counted(layout, mask):
    seen = visible(SEQ_LEN, mask.causal, mask.window, mask.cu_seqlens)
    for rank in range(WORLD):
        held = LAYOUTS[layout].positions(SEQ_LEN, rank, WORLD)
        assert visible_pairs(layout, SEQ_LEN, rank, WORLD, mask) == int(seen[held].sum())


def test_balance_of_the_layouts():
    assert imbalance("zigzag", 1 << 20, 8, Mask()) == 1.0
    assert imbalance("contiguous", 1 << 20, 8, Mask()) == pytest.approx(15 / 8, rel=1e-3)
    assert imbalance("striped", 1 << 20, 8, Mask()) == pytest.approx(1, rel=1e-4)
    # One long document among short ones lies on few of zigzag's pieces.
    bounds = (0, *range(1024, 65536, 1024), 131072)
    assert imbalance("zigzag", 131072, 2, Mask(cu_seqlens=bounds)) > 1.2
    assert torch.isfinite(torch.tensor(imbalance("zigzag", 64, 2, Mask(window=1))))
