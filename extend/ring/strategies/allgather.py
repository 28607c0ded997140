"""All keys at once, for some heads at a time: few, large blocks, memory for the whole sequence.

Kernels that take bands see the keys of every rank in the order of their positions: one call for
each piece of the local queries, and nothing to join. Others compute their own block first, while
the rest arrives, and then at most two large rectangles. Gathered memory is bounded: the heads are
taken in as many groups as that needs, the next group arriving while one is computed.

Source: the context parallelism of Llama 3, arXiv:2407.21783, section 3.3.2.
"""

import functools
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from extend.ring.blocks import KeySum, fill_block, open_block, split_heads
from extend.ring.call import Call, shift_keys
from extend.ring.comm import Transfer, Window
from extend.ring.partial import AttentionSum, GradientSum, sums_keys
from extend.ring.strategies.local import SavesLocal
from extend.ring.tiles import Tile, rows_needed

# Of keys and values of one group of heads; two groups are held at a time, and their gradients.
GATHERED_BYTES = 2 << 30


class Place(NamedTuple):
    """Where a piece of one rank's rows lies among the gathered rows."""

    source: int
    rows: slice  # of the source's own part
    into: slice  # of the gathered buffer


Plan = tuple[tuple[Tile, ...], tuple[Place, ...]]  # tiles on gathered rows; where those come from


class Plans(NamedTuple):
    """Those of every rank: each says what it gets and, of its keys, what the others do.

    Attributes:
        by_rank: the plan of each.
        most: the largest number of pieces that one rank gives another.
        wide: some rank sums over several of its tiles; such sums travel in fp32, so that they are
            rounded only once.
    """

    by_rank: dict[int, Plan]
    most: int
    wide: bool


class AllGather(SavesLocal):
    """Gather keys by groups of heads; send the shares of their gradients home in one exchange."""

    def __init__(self, call: Call, groups: int | None = None):
        """`groups` of heads are gathered one after another; None: as many as memory asks for."""
        self.call = call
        self._groups = groups
        # A kernel for bands gathers its own keys too: then no result has to be joined.
        self._whole = call.kernel.bands
        plans = _plans(replace(call, comm=_Ranks(call.comm.world)), call.comm.world)
        self._gathered, self._most, self._wide = plans
        self._tiles, self._places = self._gathered[call.comm.rank]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out [b, h, s, d] of the local queries, and what `backward` needs."""
        call, groups = self.call, self._num_groups(k)
        own = () if self._whole else call.tiles(call.comm.rank, call.comm.rank)
        total = AttentionSum(q, call, [own, self._tiles])
        window = self._publish(k, v, groups)
        ahead = self._gather(window, k, 0, groups)
        total.add(own, k, v)
        for group in range(groups):
            transfer, keys = ahead
            ahead = self._gather(window, k, group + 1, groups) if group + 1 < groups else None
            transfer.wait()
            total.add(self._tiles, *open_block(keys), _heads(q, group, groups))
        out, lse = total.result()
        return out, (q, k, v, out, lse)

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the local q, k, v."""
        q, k, v, out, lse = saved
        call, groups = self.call, self._num_groups(k)
        own = () if self._whole else call.tiles(call.comm.rank, call.comm.rank)
        total = GradientSum(dout, q, out, lse, call, [own, self._tiles])
        home = KeySum(k, call.comm.world)
        window = self._publish(k, v, groups)
        ahead = self._gather(window, k, 0, groups)
        first, *others = split_heads(k, q.shape[1], call.fetched(call.comm.rank)) if own else [None]
        self._add_own(total, home, own, k, v, first)
        passing = None
        for group in range(groups):
            transfer, keys = ahead
            ahead = self._gather(window, k, group + 1, groups) if group + 1 < groups else None
            transfer.wait()
            shares = total.add(self._tiles, *open_block(keys), _heads(q, group, groups))
            following = self._send_home(k, shares, group, groups)
            del keys, shares  # their memory is wanted for the next group
            self._collect(home, passing)
            passing = following
        for half in others:
            self._add_own(total, home, own, k, v, half)
        self._collect(home, passing)
        return total.dq(), *home.result()

    def _add_own(
        self, total: GradientSum, home: KeySum, own: tuple[Tile, ...], k: Tensor, v: Tensor,
        half: tuple[slice, slice] | None,
    ) -> None:  # fmt: skip
        if half is not None:
            heads, kv_heads = half
            home.add_own(*total.add(own, k[:, kv_heads], v[:, kv_heads], heads), kv_heads)

    def _num_groups(self, k: Tensor) -> int:
        """A divisor of the number of key heads."""
        num_kv_heads = k.shape[1]
        gathered = 2 * k.nbytes * self.call.comm.world
        least = max(-(-gathered // GATHERED_BYTES), 2 if self._whole else 1)
        wanted = min(self._groups or least, num_kv_heads)
        return next(n for n in range(wanted, num_kv_heads + 1) if num_kv_heads % n == 0)

    def _publish(self, k: Tensor, v: Tensor, groups: int) -> Window:
        """Offer all keys: [groups, s, 2, b, h_kv / groups, d], each group in one piece."""
        batch, num_kv_heads, rows, head_dim = k.shape
        of_group = num_kv_heads // groups

        def write(buffer: Tensor) -> None:
            for group in range(groups):
                heads = slice(group * of_group, (group + 1) * of_group)
                fill_block(buffer[group], k[:, heads], v[:, heads])

        return self.call.comm.publish(
            "all keys", (groups, rows, 2, batch, of_group, head_dim), k, write
        )

    def _gather(
        self, window: Window, k: Tensor, group: int, groups: int
    ) -> tuple[Transfer, Tensor]:
        """Start to fetch one group's rows from all ranks: [rows, 2, b, h_kv / groups, d]."""
        comm = self.call.comm
        keys = k.new_empty(self._gathered_shape(k, groups, _num_rows(self._places)))
        fetches = []
        for step in range(comm.world):
            for index in range(self._most):
                into = _place(self._places, (comm.rank - step) % comm.world, index)
                fetches.append((
                    step, None if into is None else keys[into.into],
                    self._selector(step, index, group),
                ))  # fmt: skip
        transfer = window.fetch_all(fetches)
        if group + 1 == groups:
            window.close()
        return transfer, keys

    def _selector(self, step: int, index: int, group: int):
        """What a rank hands out as its `index`-th piece to the rank `step` places on."""

        def select(buffer: Tensor, receiver: int) -> Tensor | None:
            sender = (receiver - step) % self.call.comm.world
            place = _place(self._gathered[receiver][1], sender, index)
            return None if place is None else buffer[group][place.rows]

        return select

    def _send_home(
        self, k: Tensor, shares: tuple[Tensor, Tensor], group: int, groups: int
    ) -> tuple[Transfer, list[tuple[slice, Tensor, slice]]]:
        """Send every rank its keys' shares; start to receive those for the own ones."""
        comm = self.call.comm
        most = max(_num_rows(places) for _, places in self._gathered.values())
        dtype = torch.promote_types(k.dtype, torch.float32) if self._wide else k.dtype
        window = comm.publish(
            f"shares {group % 2}", self._gathered_shape(k, groups, most),
            k.new_empty(0, dtype=dtype),
            lambda buffer: fill_block(buffer, *shares),
        )  # fmt: skip
        arriving, fetches, heads = [], [], _kv_heads(k, group, groups)
        for step in range(comm.world):
            for index in range(self._most):
                place = _place(self._gathered[(comm.rank - step) % comm.world][1], comm.rank, index)
                into = None
                if place is not None:
                    num_rows = place.rows.stop - place.rows.start
                    into = k.new_empty(self._gathered_shape(k, groups, num_rows), dtype=dtype)
                    arriving.append((place.rows, into, heads))
                fetches.append((step, into, self._returner(step, index)))
        transfer = window.fetch_all(fetches)
        window.close()
        return transfer, arriving

    def _returner(self, step: int, index: int):
        """What a rank sends back of the `index`-th piece of the rank `step` places on."""

        def select(buffer: Tensor, receiver: int) -> Tensor | None:
            sender = (receiver - step) % self.call.comm.world
            place = _place(self._gathered[sender][1], receiver, index)
            return None if place is None else buffer[place.into]

        return select

    def _collect(
        self, home: KeySum, passing: tuple[Transfer, list[tuple[slice, Tensor, slice]]] | None
    ) -> None:
        if passing is None:
            return
        transfer, arriving = passing
        transfer.wait()
        for rows, block, heads in arriving:
            home.add_block(rows, block, heads)

    def _gathered_shape(self, k: Tensor, groups: int, rows: int) -> tuple[int, ...]:
        return rows, 2, k.shape[0], k.shape[1] // groups, k.shape[3]


class _Ranks(NamedTuple):
    """In place of a comm in plans that are kept, or its process group would be kept as well."""

    world: int


@functools.lru_cache(maxsize=64)
def _plans(call: Call, world: int) -> Plans:
    """What `AllGather` needs of a call, and what follows from it."""
    by_rank = {rank: _plan(call, rank) for rank in range(world)}
    return Plans(
        by_rank, _most_places(by_rank), any(sums_keys(tiles) for tiles, _ in by_rank.values())
    )


def _plan(call: Call, rank: int) -> Plan:
    """What `rank` computes on gathered rows, and where those come from; only rows it needs."""
    sources = tuple(r for r in range(call.comm.world) if call.kernel.bands or r != rank)
    if not sources:
        return (), ()
    tiles, pieces = call.gather(rank, sources)
    hull = rows_needed(tiles)
    if hull is None:
        return (), ()
    seen = _seen(tiles)
    places = [
        Place(source, *clipped)
        for source, ranges in zip(sources, pieces, strict=True)
        for rows, into in ranges
        if (clipped := _clip(rows, into, seen, hull.start)) is not None
    ]
    return shift_keys(tiles, hull), tuple(places)


def _heads(q: Tensor, group: int, groups: int) -> slice | None:
    """The query heads of one group, None for all."""
    size = q.shape[1] // groups
    return slice(group * size, (group + 1) * size) if groups > 1 else None


def _kv_heads(k: Tensor, group: int, groups: int) -> slice:
    size = k.shape[1] // groups
    return slice(group * size, (group + 1) * size)


def _seen(tiles: tuple[Tile, ...]) -> list[tuple[int, int]]:
    """The key rows of the tiles, from and to, in ranges that do not touch each other."""
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted((tile.kv.start, tile.kv.stop) for tile in tiles):
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(stop, ranges[-1][1])
        else:
            ranges.append((start, stop))
    return ranges


def _clip(
    rows: slice, into: slice, seen: list[tuple[int, int]], origin: int
) -> tuple[slice, slice] | None:
    """A piece without the ends that are not `seen`, its place counted from `origin`.

    `into` may have a step. None where nothing of it is seen.
    """
    inside = [r for r in seen if r[0] < into.stop and into.start < r[1]]
    if not inside:
        return None
    step = into.step or 1
    first = max(0, -(-(inside[0][0] - into.start) // step))
    last = min(rows.stop - rows.start, -(-(inside[-1][1] - into.start) // step))
    if first >= last:
        return None
    start = into.start + first * step - origin
    stop = start + (last - first - 1) * step + 1
    return slice(rows.start + first, rows.start + last), slice(start, stop, step)


def _num_rows(places: tuple[Place, ...]) -> int:
    return max((place.into.stop for place in places), default=0)


def _place(places: tuple[Place, ...], source: int, index: int) -> Place | None:
    """The `index`-th piece that comes from `source`, if there is one."""
    found = [place for place in places if place.source == source]
    return found[index] if index < len(found) else None


def _most_places(gathered: dict[int, Plan]) -> int:
    """The largest number of pieces that one rank gives another."""
    counts = (Counter(place.source for place in places) for _, places in gathered.values())
    return max((max(count.values()) for count in counts if count), default=0)
