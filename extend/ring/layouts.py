"""Which positions of a sequence each rank holds.

A layout answers one question, `runs`: the positions that a rank holds, in the order of its rows.
What is computed follows from it (tiles.py), and so does what several ranks hold together (`union`).

Lengths are tokens; `seq_len` is the length of the whole sequence.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from extend.errors import LayoutError
from extend.registry import lookup
from extend.ring.tiles import Run, merge_runs, positions_of


class Layout:
    """What a layout answers. Add one: a small class, one line in LAYOUTS; the tests find it.

    Attributes:
        divisor: the local length must be a multiple of this.
        interleaved: neighbouring positions are on neighbouring ranks; otherwise mostly on one.
    """

    divisor = 1
    interleaved = False

    def runs(self, seq_len: int, rank: int, world: int) -> tuple[Run, ...]:
        """The positions that `rank` holds, seq_len / world of them, rising."""
        raise NotImplementedError

    def positions(self, seq_len: int, rank: int, world: int) -> Tensor:
        """The same, written out: int64 [seq_len / world], in local order."""
        return positions_of(self.runs(seq_len, rank, world))


class Contiguous(Layout):
    """Rank r holds the r-th piece. Simple, and unbalanced: the last rank works all the time.

    Source: Ring Attention, arXiv:2310.01889.
    """

    def runs(self, seq_len: int, rank: int, world: int) -> tuple[Run, ...]:
        local_len = seq_len // world
        return (Run(rank * local_len, 1, local_len),)


class Zigzag(Layout):
    """Of 2 * world pieces rank r holds piece r and its mirror image, piece 2 * world - 1 - r.

    Every rank has the same work on the keys of every other rank: half a square.

    Source: the head-tail split of Llama 3, arXiv:2407.21783, section 3.3.2.
    """

    divisor = 2

    def runs(self, seq_len: int, rank: int, world: int) -> tuple[Run, ...]:
        piece = seq_len // (2 * world)
        mirror = 2 * world - 1 - rank
        return Run(rank * piece, 1, piece), Run(mirror * piece, 1, piece)


class Striped(Layout):
    """Rank r holds positions r, r + world, r + 2 * world, ...

    The keys of every rank give a triangle; those of a later rank meet the queries one place on.

    Source: Striped Attention, arXiv:2311.09431.
    """

    interleaved = True

    def runs(self, seq_len: int, rank: int, world: int) -> tuple[Run, ...]:
        return (Run(rank, world, seq_len // world),)


class Union(NamedTuple):
    """What several ranks hold together, in as few runs as possible.

    Attributes:
        runs: the positions of the union's rows. They rise, except where an interleaved layout
            leaves gaps that no even stride describes; then rank follows rank.
        places: for each rank, in the order given, pairs of (rows of its own part, the rows of the
            union that they become, possibly with a step).
    """

    runs: tuple[Run, ...]
    places: tuple[tuple[tuple[slice, slice], ...], ...]


@functools.lru_cache(maxsize=1024)
def union(layout: str, seq_len: int, ranks: tuple[int, ...], world: int) -> Union:
    """Put the rows of several different `ranks` into the order of their positions.

    Raises:
        LayoutError: `seq_len` does not divide over `world` ranks.
    """
    check_length(seq_len, layout, world)
    parts = []  # (run, whose, from which of its rows on)
    for index, rank in enumerate(ranks):
        row = 0
        for run in merge_runs(LAYOUTS[layout].runs(seq_len, rank, world)):
            parts.append((run, index, row))
            row += run.count
    parts.sort()
    runs = [run for run, _, _ in parts]
    step = len(runs) if _interlock(runs) else 1
    places: list[list[tuple[slice, slice]]] = [[] for _ in ranks]
    first = 0
    for order, (run, index, row) in enumerate(parts):
        start = order if step > 1 else first
        rows = slice(start, start + (run.count - 1) * step + 1, step if step > 1 else None)
        places[index].append((slice(row, row + run.count), rows))
        first += run.count
    if step > 1:
        runs = [Run(runs[0].start, runs[0].stride // step, first)]
    return Union(merge_runs(runs), tuple(tuple(pairs) for pairs in places))


def _interlock(runs: Sequence[Run]) -> bool:
    """Whether sorted `runs` of one stride take turns evenly, so that they are one run together."""
    if len(runs) < 2 or runs[0].stride % len(runs):
        return False
    finer = runs[0].stride // len(runs)
    return all(
        run == runs[0]._replace(start=runs[0].start + order * finer)
        for order, run in enumerate(runs)
    )


def ulysses_ranks(layout: str, rank: int, world: int, degree: int) -> tuple[int, ...]:
    """The `degree` ranks, `rank` among them, that split their heads rather than their rows.

    Together they hold what one of world / degree ranks would hold in the same layout. They are
    neighbours, or every (world / degree)-th rank where neighbouring positions are.

    Raises:
        LayoutError: `degree` does not divide `world`.
        RecipeError: no such layout.
    """
    if degree < 1 or world % degree:
        raise LayoutError(
            f"layout {layout!r}: {world} ranks cannot be split into groups of {degree} that share "
            f"heads; choose a degree that divides {world}"
        )
    groups = world // degree
    if lookup(LAYOUTS, layout, "layout").interleaved:
        return tuple(range(rank % groups, world, groups))
    first = rank // degree * degree
    return tuple(range(first, first + degree))


def length_multiple(layout: str, world: int) -> int:
    """The number that a sequence length must be a multiple of."""
    return lookup(LAYOUTS, layout, "layout").divisor * world


def check_length(seq_len: int, layout: str, world: int) -> None:
    """Check that a sequence of `seq_len` tokens divides over `world` ranks.

    Raises:
        LayoutError: it does not; the message gives the nearest lengths that do.
    """
    multiple = length_multiple(layout, world)
    if seq_len > 0 and seq_len % multiple == 0:
        return
    below, above = seq_len // multiple * multiple, (seq_len // multiple + 1) * multiple
    choice = f"{below} or {above}" if below > 0 else str(above)
    raise LayoutError(
        f"layout {layout!r}: length {seq_len} must be a multiple of "
        f"{multiple // world} x {world} ranks = {multiple}; use {choice}"
    )


def shard(tensor: Tensor, dim: int, layout: str, rank: int, world: int) -> Tensor:
    """The part of a whole `tensor` that `rank` holds, split along `dim`; always a new tensor.

    Raises:
        LayoutError: the size of `dim` does not divide over the ranks.
    """
    seq_len = tensor.shape[dim]
    check_length(seq_len, layout, world)
    positions = LAYOUTS[layout].positions(seq_len, rank, world)
    return tensor.index_select(dim, positions.to(tensor.device))


def unshard(shards: Sequence[Tensor], dim: int, layout: str) -> Tensor:
    """The whole tensor from the parts of all ranks, in rank order: the inverse of `shard`."""
    world = len(shards)
    joined = torch.cat(tuple(shards), dim)
    seq_len = joined.shape[dim]
    check_length(seq_len, layout, world)
    held = [LAYOUTS[layout].positions(seq_len, rank, world) for rank in range(world)]
    order = torch.argsort(torch.cat(held))
    return joined.index_select(dim, order.to(joined.device))


LAYOUTS: dict[str, Layout] = {
    "contiguous": Contiguous(),
    "zigzag": Zigzag(),
    "striped": Striped(),
}
