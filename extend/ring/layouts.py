"""Which positions of a sequence each rank holds, and which blocks it computes at each ring step.

At step t, rank r meets the keys and values that rank (r - t) % world started with. A layout
answers two questions, and everything else here is derived from the answers: `positions`, the
global positions a rank holds, and `block`, the part of the local queries that meets a part of
the received keys under a causal mask. Over all ranks and steps every causal (query, key) pair
is in exactly one block, once.

Lengths are tokens; `local_len` is the length on one rank, `seq_len` that of the whole sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from extend.errors import LayoutError
from extend.registry import lookup


class Block(NamedTuple):
    """Which local queries meet which received keys at one step."""

    q: slice
    kv: slice
    causal: bool  # lower triangular inside the block, which is then square


EVERYTHING = slice(None)


class Layout(Protocol):
    """What a layout answers. Add one: a small class, one line in LAYOUTS; the tests find it."""

    divisor: int  # the local length must be a multiple of this

    def positions(self, seq_len: int, rank: int, world: int) -> Tensor:
        """Global positions that `rank` holds, int64 [seq_len / world], in local order."""
        ...

    def block(self, step: int, rank: int, world: int, local_len: int) -> Block | None:
        """The causal block that `rank` computes at `step`, or None if the mask leaves nothing.

        At step 0 it is every local query against every local key, causal, in every layout whose
        local positions increase.
        """
        ...


class Contiguous:
    """Rank r holds the r-th piece. Simple, and unbalanced: the last rank works all the time.

    Source: Ring Attention, arXiv:2310.01889.
    """

    divisor = 1

    def positions(self, seq_len: int, rank: int, world: int) -> Tensor:
        local_len = seq_len // world
        return torch.arange(rank * local_len, (rank + 1) * local_len)

    def block(self, step: int, rank: int, world: int, local_len: int) -> Block | None:
        if step > rank:
            return None  # keys of a later piece
        return Block(EVERYTHING, EVERYTHING, causal=step == 0)


class Zigzag:
    """Of 2 * world pieces rank r holds piece r and its mirror image, piece 2 * world - 1 - r.

    Every rank has the same work at every step after the first: half a square.

    Source: the head-tail split of Llama 3, arXiv:2407.21783, section 3.3.2.
    """

    divisor = 2

    def positions(self, seq_len: int, rank: int, world: int) -> Tensor:
        piece = seq_len // (2 * world)
        mirror = 2 * world - 1 - rank
        head = torch.arange(rank * piece, (rank + 1) * piece)
        tail = torch.arange(mirror * piece, (mirror + 1) * piece)
        return torch.cat((head, tail))

    def block(self, step: int, rank: int, world: int, local_len: int) -> Block | None:
        half = local_len // 2
        if step == 0:
            return Block(EVERYTHING, EVERYTHING, causal=True)
        if step <= rank:  # keys of an earlier rank: its head precedes, its tail follows us
            return Block(EVERYTHING, slice(0, half), causal=False)
        return Block(slice(half, None), EVERYTHING, causal=False)  # both lie before our tail only


class Striped:
    """Rank r holds positions r, r + world, r + 2 * world, ...

    Every block is a triangle; keys of a later rank meet the queries one place on.

    Source: Striped Attention, arXiv:2311.09431.
    """

    divisor = 1

    def positions(self, seq_len: int, rank: int, world: int) -> Tensor:
        return torch.arange(rank, seq_len, world)

    def block(self, step: int, rank: int, world: int, local_len: int) -> Block | None:
        if step <= rank:
            return Block(EVERYTHING, EVERYTHING, causal=True)
        if local_len == 1:
            return None
        # Query i lies before key i here, so the diagonal goes: drop the first query, the last key.
        return Block(slice(1, None), slice(0, -1), causal=True)


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
