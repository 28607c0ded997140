"""The oracle of the planner: (query, key) pairs of positions, written out from the definitions."""

from itertools import product

import numpy as np

from extend.ring.layouts import LAYOUTS, length_multiple, ulysses_ranks, union
from extend.ring.mask import ANTICAUSAL, CAUSAL, FULL, Mask
from extend.ring.tiles import Run, Tile, positions_of

Plan = tuple[tuple[Run, ...], tuple[Run, ...], tuple[Tile, ...]]  # queries, keys, tiles


def visible_pairs(queries: np.ndarray, keys: np.ndarray, mask: Mask) -> np.ndarray:
    """Which query positions may see which key positions, bool [queries, keys]."""
    distance = queries[:, None] - keys[None, :]
    seen = np.ones_like(distance, dtype=bool)
    if mask.causal:
        seen &= distance >= 0
    if mask.window is not None:
        seen &= distance < mask.window
    if mask.cu_seqlens is not None:
        ours, theirs = (np.searchsorted(mask.cu_seqlens, p, "right") for p in (queries, keys))
        seen &= ours[:, None] == theirs[None, :]
    return seen


def tile_pairs(tile: Tile) -> np.ndarray:
    """Which of its query rows a tile lets see which of its key rows, bool [rows, keys]."""
    rows, keys = tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
    lo, hi, cu_seqlens = tile.mask
    distance = np.arange(rows)[:, None] - np.arange(keys)[None, :]
    seen = np.ones_like(distance, dtype=bool)
    if lo is not None:
        seen &= distance >= lo
    if hi is not None:
        seen &= distance <= hi
    if cu_seqlens is not None:
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == rows == keys, tile
        document = np.searchsorted(cu_seqlens, np.arange(rows), "right")
        seen &= document[:, None] == document[None, :]
    return seen


def coverage_problem(plans: list[Plan], seq_len: int, mask: Mask) -> str | None:
    """What is wrong with plans that together should compute every visible pair exactly once."""
    count = np.zeros((seq_len, seq_len), dtype=np.int64)
    for queries, keys, tiles in plans:
        q, kv = positions_of(queries).numpy(), positions_of(keys).numpy()
        for tile in tiles:
            seen = tile_pairs(tile)
            if seen.shape != (q[tile.q].size, kv[tile.kv].size):
                return f"{tile} reaches beyond {q.size} queries and {kv.size} keys"
            if not (seen.any(axis=1).all() and seen.any(axis=0).all()):
                return f"{tile} has a query that sees nothing or a key that nobody sees"
            if max(q[tile.q].max(), kv[tile.kv].max()) >= seq_len:
                return f"{tile} holds a position behind the end, {seq_len}"
            np.add.at(count, np.ix_(q[tile.q], kv[tile.kv]), seen)
    everything = np.arange(seq_len)
    wrong = np.argwhere(count != visible_pairs(everything, everything, mask))
    if wrong.size == 0:
        return None
    query, key = wrong[0]
    return f"query {query} meets key {key} {count[query, key]} times; {len(wrong)} such pairs"


def kind_problem(tiles: tuple[Tile, ...], *, bands: bool, packed: bool) -> str | None:
    """A tile that a kernel without bands or without cu_seqlens cannot take."""
    for tile in tiles:
        plain = tile.mask._replace(cu_seqlens=None)
        square = tile.q.stop - tile.q.start == tile.kv.stop - tile.kv.start
        if tile.mask.cu_seqlens and (not packed or (not bands and plain == ANTICAUSAL)):
            return f"{tile} is packed"
        if not bands and plain != FULL and not (square and plain in (CAUSAL, ANTICAUSAL)):
            return f"{tile} is a band"
    return None


def sharings(layout: str, seq_len: int, world: int) -> dict[str, list[tuple[tuple[Run, ...], ...]]]:
    """Ways to share the work out: (query runs, key runs) that together are all pairs, once."""
    ranks = tuple(range(world))
    held = [LAYOUTS[layout].runs(seq_len, rank, world) for rank in ranks]

    def together(members: tuple[int, ...]) -> tuple[Run, ...]:
        return union(layout, seq_len, members, world).runs

    ways = {"ring": list(product(held, held)), "one": [(together(ranks), together(ranks))]}
    others = [together((*ranks[:rank], *ranks[rank + 1 :])) for rank in ranks]
    ways["gather"] = [*zip(held, held, strict=True), *zip(held, others, strict=True)]
    for degree in (d for d in range(2, world) if world % d == 0):
        groups = sorted({ulysses_ranks(layout, rank, world, degree) for rank in ranks})
        parts = [together(group) for group in groups]
        ways[f"groups of {degree}"] = list(product(parts, parts))
    return ways


def masks_for(seq_len: int, piece: int) -> list[Mask]:
    """Full, causal, windows around the size of a piece, documents of all sizes, and both."""
    windows = sorted({1, 2, max(1, piece - 1), piece + 1, 2 * piece + 2, max(1, seq_len - 1)})
    rng = np.random.default_rng(seq_len)
    inner = np.arange(1, seq_len)
    documents = {
        tuple(range(seq_len + 1)),
        (0, 1, seq_len),
        tuple(range(0, seq_len, piece)) + (seq_len,),
        (0, *np.sort(rng.choice(inner, seq_len // 5, replace=False)).tolist(), seq_len),
        (0, *np.sort(rng.choice(inner, seq_len // 2, replace=False)).tolist(), seq_len),
    }
    documents = sorted(d for d in documents if len(d) > 2)
    both = [(w, d) for w in windows[1::2] for d in documents]
    return [
        Mask(causal=False),
        Mask(),
        *(Mask(window=w) for w in windows),
        *(Mask(causal, None, d) for d in documents for causal in (True, False)),
        *(Mask(True, w, d) for w, d in both),
    ]


def lengths(layout: str, world: int) -> tuple[int, int]:
    """The shortest length that the layout takes, and one of 6 tokens a rank."""
    return length_multiple(layout, world), 6 * world
