"""How evenly a layout spreads the work of a mask over its ranks."""

import functools
from bisect import bisect_right

from extend.ring.layouts import LAYOUTS
from extend.ring.mask import Mask


@functools.lru_cache(maxsize=256)
def imbalance(layout: str, seq_len: int, world: int, mask: Mask) -> float:
    """The work of the busiest rank over the mean: 1.0 is perfect balance, `world` the worst.

    Work is counted in (query, key) pairs that the mask lets through. Zigzag balances one causal
    document exactly; several documents fall on its pieces as they happen to.
    """
    pairs = [visible_pairs(layout, seq_len, rank, world, mask) for rank in range(world)]
    return max(pairs) * world / sum(pairs)


def visible_pairs(layout: str, seq_len: int, rank: int, world: int, mask: Mask) -> int:
    """How many (query, key) pairs of the whole sequence have their query on `rank`."""
    bounds = mask.cu_seqlens or (0, seq_len)
    total = 0
    for start, stride, count in LAYOUTS[layout].runs(seq_len, rank, world):
        position, left = start, count
        while left:
            document = bisect_right(bounds, position) - 1
            begin, end = bounds[document], bounds[document + 1]
            inside = min(left, -(-(end - position) // stride))
            total += _pairs_of_run(position - begin, stride, inside, end - begin, mask)
            position, left = position + inside * stride, left - inside
    return total


def _pairs_of_run(first: int, stride: int, count: int, length: int, mask: Mask) -> int:
    """Keys seen by the queries at first, first + stride, ... of a document of `length` tokens."""
    if not mask.causal:
        return count * length
    limit = mask.window or length
    growing = min(count, max(0, (limit - 1 - first) // stride + 1))  # those that see all so far
    seen = growing * (first + 1) + stride * growing * (growing - 1) // 2
    return seen + (count - growing) * limit
