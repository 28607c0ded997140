"""What one call of the ring computes, apart from the tensors."""

import functools
from dataclasses import dataclass, field

from extend.ring.comm import RingComm
from extend.ring.kernels import Kernel
from extend.ring.layouts import LAYOUTS, Union, union
from extend.ring.mask import Mask
from extend.ring.tiles import Run, Tile, fit_tiles, plan_tiles, rows_needed

# For each source, of each piece: rows of its own part, rows of the whole (may have a step).
Places = tuple[tuple[tuple[slice, slice], ...], ...]

_KEPT = 512  # plans; with thousands of documents each takes a good part of a MiB


@dataclass(frozen=True)
class Call:
    """Attention over a sequence of `seq_len` tokens that the ranks of `comm` hold by `layout`."""

    comm: RingComm = field(compare=False)
    layout: str
    mask: Mask
    kernel: Kernel
    softmax_scale: float
    seq_len: int

    def tiles(self, rank: int, source: int) -> tuple[Tile, ...]:
        """What `rank` computes on the keys that started on `source`."""
        world = self.comm.world
        return self._fit(
            _runs(self.layout, self.seq_len, rank, world),
            _runs(self.layout, self.seq_len, source, world),
        )

    def gather(self, rank: int, sources: tuple[int, ...]) -> tuple[tuple[Tile, ...], Places]:
        """What `rank` computes on the keys of all `sources` put together, and where they lie.

        They lie in the order of their positions if those then rise as evenly as the queries', which
        makes the fewest tiles; otherwise (striped) one source after another.
        """
        world = self.comm.world
        queries = _runs(self.layout, self.seq_len, rank, world)
        joined = union(self.layout, self.seq_len, sources, world)
        if {run.stride for run in joined.runs} != {run.stride for run in queries}:
            joined = _one_after_another(self.layout, self.seq_len, sources, world)
        return self._fit(queries, joined.runs), joined.places

    def _fit(self, queries: tuple[Run, ...], keys: tuple[Run, ...]) -> tuple[Tile, ...]:
        return _tiles(queries, keys, self.mask, self.kernel.bands, self.kernel.packed)

    def needed(self, rank: int, source: int) -> slice | None:
        """The rows of `source`'s keys that `rank` has a use for."""
        return rows_needed(self.tiles(rank, source))

    def fetched(self, rank: int) -> int:
        """How many rows of the others' keys `rank` has a use for."""
        others = (self.needed(rank, other) for other in range(self.comm.world) if other != rank)
        return sum(rows.stop - rows.start for rows in others if rows is not None)


def shift_keys(tiles: tuple[Tile, ...], rows: slice) -> tuple[Tile, ...]:
    """The same tiles for a tensor that holds only `rows` of the keys."""
    if rows.start == 0:
        return tiles
    return tuple(
        tile._replace(kv=slice(tile.kv.start - rows.start, tile.kv.stop - rows.start))
        for tile in tiles
    )


@functools.lru_cache(maxsize=_KEPT)
def _runs(layout: str, seq_len: int, rank: int, world: int) -> tuple[Run, ...]:
    return LAYOUTS[layout].runs(seq_len, rank, world)


@functools.lru_cache(maxsize=_KEPT)
def _one_after_another(
    layout: str, seq_len: int, sources: tuple[int, ...], world: int
) -> Union:
    length = seq_len // world
    parts = [slice(i * length, (i + 1) * length) for i in range(len(sources))]
    return Union(
        runs=sum((_runs(layout, seq_len, source, world) for source in sources), ()),
        places=tuple(((slice(0, length), part),) for part in parts),
    )


@functools.lru_cache(maxsize=_KEPT)
def _tiles(
    queries: tuple[Run, ...], keys: tuple[Run, ...], mask: Mask, bands: bool, packed: bool
) -> tuple[Tile, ...]:
    return fit_tiles(plan_tiles(queries, keys, mask), bands=bands, packed=packed)
