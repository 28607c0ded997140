"""Keys and values of one growing row, each rank holding those of its own tokens.

A row is read in parts. The tokens of a *spread* part are dealt over all ranks by a layout, padded
on the right to a length that divides; those of a part with an *owner* are computed by every rank,
and their keys are kept by one. Where everybody's keys lie follows from the parts alone, so ranks
never ask each other. A part's padding is dropped before anything is added after it.

Shapes: b = 1 row, h_kv key heads, n tokens of one rank, d head_dim. Positions are those of the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from extend.errors import CompatibilityError
from extend.ring.blocks import block_shape, fill_block, open_block
from extend.ring.layouts import LAYOUTS, length_multiple
from extend.ring.tiles import Run, merge_runs

LAYOUT = "zigzag"
GROWTH = 1024  # tokens, where a row outgrows its capacity


@dataclass(frozen=True)
class Part:
    """Tokens that are read in one forward.

    Attributes:
        begin: position of the first.
        count: how many they are.
        owner: the rank that keeps the keys; None: every rank those that the layout gives it.
        kept: so many of the first are still of use; None: all.
    """

    begin: int
    count: int
    owner: int | None = None
    kept: int | None = None

    @property
    def end(self) -> int:
        """The position after the last that is of use."""
        return self.begin + (self.count if self.kept is None else self.kept)

    def padded_len(self, world: int) -> int:
        """Tokens that are computed, all ranks together where the part is spread."""
        multiple = 1 if self.owner is not None else length_multiple(LAYOUT, world)
        return -(-self.count // multiple) * multiple

    def runs(self, rank: int, world: int) -> tuple[Run, ...]:
        """The positions whose keys `rank` computes and keeps, padding included."""
        length = self.padded_len(world)
        if self.owner is not None:
            return (Run(self.begin, 1, length),) if rank == self.owner else ()
        return tuple(run._replace(start=self.begin + run.start)
                     for run in LAYOUTS[LAYOUT].runs(length, rank, world))


class Shards:
    """What one rank holds of a row, and where the rest of it is.

    Args:
        rank, world: this process among those that share the row.

    Attributes:
        capacity: keys that this rank may come to have in a layer; memory is taken for so many, and
            for more when more come.
        parts: what has been read and is kept.
        reach: layers with a window w have dropped the keys before position reach - (w - 1).
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.capacity = rank, world, 0
        self.parts: list[Part] = []
        self.reach = 0
        self._before = 0  # `reach` before the part that is being read
        self._full: dict[int, Tensor] = {}  # layer -> block [rows, 2, 1, h_kv, d]
        self._recent: dict[int, tuple[Tensor, Tensor]] = {}  # layer with a window -> k, v

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.parts[-1].end if self.parts else 0

    def expect(self, count: int) -> None:
        """Take memory for at least so many more keys of this rank when the next ones come."""
        self.capacity = max(self.capacity, _count(self.held(self.rank, None)) + count)

    def begin(self, part: Part) -> None:
        """Get ready for the keys of the next part."""
        self._before = self.reach
        if part.owner is None:
            self.reach = max(self.reach, part.begin)

    def end(self, part: Part) -> None:
        """Note that every layer has put its keys of a part, which is to be kept."""
        last = self.parts[-1] if self.parts else None
        if last is not None and part.owner is not None and last.owner == part.owner:
            self.parts[-1] = Part(last.begin, part.end - last.begin, part.owner)
        else:
            self.parts.append(part)

    def put(self, part: Part, index: int, k: Tensor, v: Tensor, *, window: int | None,
            keep: bool) -> tuple[Tensor, Tensor]:
        """Add the keys and values [1, h_kv, n, d] of a part in one layer; all that are held.

        Args:
            part: the one that `begin` was told of.
            index: of the layer.
            window: tokens that a query of this layer sees; None is all.
            keep: whether anything is read after this part.
        """
        mine = part.runs(self.rank, self.world)
        if part.owner not in (None, self.rank):
            k, v = k[:, :, :0], v[:, :, :0]
        held = _count(self.held(self.rank, window))
        if not keep and not self.parts:
            return k, v
        if window is not None:
            before = _count(self._clipped(self.rank, _floor(self._before, window)))
            return self._add_recent(index, k, v, slice(before - held, before))
        return self._add_full(index, k, v, held, held + _count(mine))

    def held(self, rank: int, window: int | None) -> tuple[Run, ...]:
        """The positions, of what was read before, whose keys `rank` holds in a layer."""
        return self._clipped(rank, 0 if window is None else _floor(self.reach, window))

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            CompatibilityError: layers with a window no longer have the keys to go on from there.
        """
        if self._recent and length < self.reach:
            raise CompatibilityError(
                f"a row of {self.length} tokens cannot go back to {length}: layers with a sliding "
                f"window have dropped what lies before its last part, which begins at "
                f"{self.reach}; read the row again, or in parts that end where it should go back")
        self.parts = [replace(part, kept=min(part.end, length) - part.begin)
                      for part in self.parts if part.begin < length]
        self.reach = min(self.reach, length)

    def _clipped(self, rank: int, first: int) -> tuple[Run, ...]:
        runs = [clip(run, first, part.end) for part in self.parts
                for run in part.runs(rank, self.world)]
        return merge_runs([run for run in runs if run.count])

    def _add_full(self, index: int, k: Tensor, v: Tensor, held: int,
                  total: int) -> tuple[Tensor, Tensor]:
        block = self._full.get(index)
        if block is None or len(block) < total:
            rows = max(self.capacity, total if block is None else total + GROWTH)
            grown = k.new_empty((rows, *block_shape(k)[1:]))
            if block is not None:
                grown[:held] = block[:held]
            block = self._full[index] = grown
        fill_block(block[held:total], k, v)
        return open_block(block[:total])

    def _add_recent(self, index: int, k: Tensor, v: Tensor,
                    kept: slice) -> tuple[Tensor, Tensor]:
        old = self._recent.get(index)
        if old is not None:
            k, v = (torch.cat((some[:, :, kept], new), dim=2)
                    for some, new in zip(old, (k, v), strict=True))
        self._recent[index] = k, v
        return k, v


def clip(run: Run, first: int, last: int) -> Run:
    """What a run of neighbouring positions has from `first` on and before `last`."""
    start = max(run.start, first)
    return Run(start, run.stride, max(0, min(run.start + run.count, last) - start))


def _floor(reach: int, window: int) -> int:
    return max(0, reach - (window - 1))


def _count(runs: Sequence[Run]) -> int:
    return sum(run.count for run in runs)
