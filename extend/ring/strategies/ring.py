"""Ring attention: keys and values of one rank at a time, two blocks of them held.

At step t rank r fetches the keys that started on rank r - t, while it computes on those of step
t - 1. In the backward pass the share of each rank in another's dk and dv goes straight home, in the
dtype of the keys, and is summed there.

Over several hosts the ring is a double ring: a block crosses the slow link to each host once, to
the rank in the same place, and is handed around inside the host; the shares of a host are summed
there and cross once as well.

Source: Ring Attention, arXiv:2310.01889; the double ring of LoongTrain, arXiv:2406.18485, sec. 4.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from extend.ring.blocks import KeySum, block_shape, open_block, publish_block, split_heads
from extend.ring.call import Call, shift_keys
from extend.ring.comm import RingComm, Transfer, Window
from extend.ring.partial import AttentionSum, GradientSum
from extend.ring.strategies.local import SavesLocal
from extend.ring.tiles import Tile

Keys = tuple[Tensor | None, Tensor | None]  # k, v [b, h_kv, n, d]; None where none is of use


@dataclass
class Homecoming:
    """A share of dk and dv on its way to the sum that it belongs to."""

    sums: KeySum
    rows: slice | None
    block: Tensor | None
    transfer: Transfer

    def collect(self) -> None:
        """Wait for it and add it."""
        self.transfer.wait()
        if self.rows is not None:
            self.sums.add_block(self.rows, self.block)


class Ring(SavesLocal):
    """One loop for every layout, mask, kernel and number of ranks and hosts."""

    def __init__(self, call: Call, inner: RingComm | None = None, outer: RingComm | None = None):
        """Over all ranks of `call.comm`; with `inner` and `outer` as a double ring.

        Args:
            inner: the ranks of this host, which are consecutive in `call.comm`.
            outer: the ranks in this rank's place on every host.
        """
        self.call = call
        self.inner = inner or call.comm
        self.outer = outer or RingComm.alone()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out [b, h, s, d] of the local queries, and what `backward` needs."""
        total = AttentionSum(q, self.call, self._portions())
        for turn, held in enumerate(self._turns(k, v)):
            for _, tiles, keys, values in self._steps(turn, k, held):
                total.add(tiles, keys, values)
                del keys, values  # or three blocks are held while the next but one is fetched
        out, lse = total.result()
        return out, (q, k, v, out, lse)

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the local q, k, v."""
        q, k, v, out, lse = saved
        total = GradientSum(dout, q, out, lse, self.call, self._portions())
        home = KeySum(k, self._num_shares(0) + self.outer.world - 1)
        first, *others = split_heads(k, q.shape[1], self.call.fetched(self.call.comm.rank))
        passing = crossing = None
        for turn, held in enumerate(self._turns(k, v)):
            sums = KeySum(k, self._num_shares(turn)) if turn else home
            for step, tiles, keys, values in self._steps(turn, k, held):
                if turn == step == 0:
                    self._add_own(total, home, k, v, *first)
                    continue
                share = total.add(tiles, keys, values) if tiles else (None, None)
                if step > 0:
                    passing = _after(passing, self._send_home(turn, step, k, share, sums))
                elif tiles:
                    sums.add_own(*share)
                del keys, values, share  # their memory is wanted for the next step
            if turn:
                passing = _after(passing, None)
                crossing = _after(crossing, self._send_across(turn, k, sums, home))
        for half in others:
            self._add_own(total, home, k, v, *half)
        _after(passing, None)
        _after(crossing, None)
        return total.dq(), *home.result()

    def _add_own(
        self, total: GradientSum, home: KeySum, k: Tensor, v: Tensor, heads: slice, kv_heads: slice
    ) -> None:
        rank = self.call.comm.rank
        tiles = self.call.tiles(rank, rank)
        home.add_own(*total.add(tiles, k[:, kv_heads], v[:, kv_heads], heads), kv_heads)

    def _turns(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        """The keys that this rank hands around inside its host, one host's after another's."""
        hosts = self.outer.world
        window = publish_block(self.outer, "turn", k, k, v) if hosts > 1 else None
        ahead = self._fetch_turn(window, 1, k) if hosts > 1 else None
        yield k, v
        for turn in range(1, hosts):
            transfer, block = ahead
            ahead = self._fetch_turn(window, turn + 1, k) if turn + 1 < hosts else None
            transfer.wait()
            yield open_block(block) if block is not None else (None, None)

    def _steps(
        self, turn: int, k: Tensor, held: Keys
    ) -> Iterator[tuple[int, tuple[Tile, ...], Tensor | None, Tensor | None]]:
        """(step, tiles, k, v): what this rank computes on the keys of each rank of its host.

        While the caller computes on what was yielded the next keys are on their way. What is
        yielded is valid for its own step only.
        """
        world, rank = self.inner.world, self.call.comm.rank
        window = self._publish_keys(turn, k, held) if world > 1 else None
        ahead = self._fetch(window, turn, 1, k) if world > 1 else None
        own = self.call.tiles(rank, self._source(turn, self.inner.rank))
        yield 0, own, *held
        for step in range(1, world):
            transfer, block = ahead
            ahead = self._fetch(window, turn, step + 1, k) if step + 1 < world else None
            transfer.wait()
            if block is None:
                yield step, (), None, None
                continue
            source = self._source(turn, (self.inner.rank - step) % world)
            tiles = shift_keys(self.call.tiles(rank, source), self.call.needed(rank, source))
            yield step, tiles, *open_block(block)

    def _publish_keys(self, turn: int, k: Tensor, held: Keys) -> Window:
        """Offer, of the keys `held` in this turn, the rows that others of this host want."""
        offered = [self._offered(turn, place) for place in range(self.inner.world)]
        most = max((rows.stop - rows.start for rows in offered if rows is not None), default=0)
        mine = offered[self.inner.rank]
        if mine is None or held[0] is None:
            wanted = None, None
        else:
            wanted = held[0][:, :, mine], held[1][:, :, mine]
        return publish_block(self.inner, "keys", k[:, :, :most], *wanted)

    def _offered(self, turn: int, place: int) -> slice | None:
        """The rows that other ranks of this host want of the keys held in `place` in this turn."""
        if self.call.mask.window is None:  # then all of them, or nearly
            return slice(0, self.call.seq_len // self.call.comm.world)
        source, others = self._source(turn, place), range(self.inner.world)
        return _span([self.call.needed(self._rank(o), source) for o in others if o != place])

    def _fetch(
        self, window: Window, turn: int, step: int, k: Tensor
    ) -> tuple[Transfer, Tensor | None]:
        """Start to fetch what the rank `step` places back holds in this turn."""
        world = self.inner.world

        def rows(receiver: int) -> slice | None:
            source = self._source(turn, (receiver - step) % world)
            return self.call.needed(self._rank(receiver), source)

        def select(block: Tensor, receiver: int) -> Tensor | None:
            wanted = rows(receiver)
            if wanted is None:
                return None
            first = self._offered(turn, (receiver - step) % world).start
            return block[wanted.start - first : wanted.stop - first]

        into = _empty_block(k, rows(self.inner.rank))
        transfer = window.fetch(step, into, select)
        if step + 1 == world:
            window.close()
        return transfer, into

    def _fetch_turn(
        self, window: Window, turn: int, k: Tensor
    ) -> tuple[Transfer, Tensor | None]:
        """Start to fetch the keys of the rank in this place, `turn` hosts back."""
        hosts = self.outer.world

        def select(block: Tensor, receiver: int) -> Tensor | None:
            source = self._rank(self.inner.rank, (receiver - turn) % hosts)
            wanted = self._host_needs(receiver, source)
            return None if wanted is None else block[wanted]

        wanted = self._host_needs(self.outer.rank, self._source(turn, self.inner.rank))
        # Of full length, so that rows are where they were; nobody looks at the others.
        block = None if wanted is None else _empty_block(k, slice(0, k.shape[2]))
        transfer = window.fetch(turn, None if block is None else block[wanted], select)
        if turn + 1 == hosts:
            window.close()
        return transfer, block

    def _send_home(
        self, turn: int, step: int, k: Tensor, share: Keys, sums: KeySum
    ) -> Homecoming:
        """Send the share in the keys of the rank `step` places back; receive one for `sums`."""
        world = self.inner.world

        def rows(receiver: int) -> slice | None:
            computing = self._rank((receiver + step) % world)
            return self.call.needed(computing, self._source(turn, receiver))

        def select(block: Tensor, receiver: int) -> Tensor | None:
            wanted = rows(receiver)
            return None if wanted is None else block[: wanted.stop - wanted.start]

        window = publish_block(self.inner, "shares", k, *share)
        wanted = rows(self.inner.rank)
        into = _empty_block(k, wanted)
        transfer = window.fetch(world - step, into, select)
        window.close()
        return Homecoming(sums, wanted, into, transfer)

    def _send_across(self, turn: int, k: Tensor, sums: KeySum, home: KeySum) -> Homecoming:
        """Send this host's sum to the rank whose keys they are; receive one for `home`."""
        hosts = self.outer.world

        def rows(receiver: int) -> slice | None:
            source = self._rank(self.inner.rank, receiver)
            return self._host_needs((receiver + turn) % hosts, source)

        def select(block: Tensor, receiver: int) -> Tensor | None:
            wanted = rows(receiver)
            return None if wanted is None else block[wanted]

        window = publish_block(self.outer, "sums", k, *sums.result())
        wanted = rows(self.outer.rank)
        into = _empty_block(k, wanted)
        transfer = window.fetch(hosts - turn, into, select)
        window.close()
        return Homecoming(home, wanted, into, transfer)

    def _rank(self, place: int, host: int | None = None) -> int:
        """The rank in `place` of `host` (default: this one)."""
        return (self.outer.rank if host is None else host) * self.inner.world + place

    def _source(self, turn: int, place: int) -> int:
        """The rank whose keys are held in `place` of this host in `turn`."""
        return self._rank(place, (self.outer.rank - turn) % self.outer.world)

    def _host_needs(self, host: int, source: int) -> slice | None:
        """The rows of `source`'s keys that some rank of `host` has a use for."""
        places = range(self.inner.world)
        return _span([self.call.needed(self._rank(place, host), source) for place in places])

    def _num_shares(self, turn: int) -> int:
        """How many ranks of this host have a share in the keys held in `turn`."""
        source = self._source(turn, self.inner.rank)
        places = range(self.inner.world)
        return sum(self.call.needed(self._rank(place), source) is not None for place in places)

    def _portions(self) -> list[tuple[Tile, ...]]:
        rank, world = self.call.comm.rank, self.call.comm.world
        return [self.call.tiles(rank, source) for source in range(world)]


def _after(previous: Homecoming | None, following: Homecoming | None) -> Homecoming | None:
    """Collect what was under way while the next was prepared."""
    if previous is not None:
        previous.collect()
    return following


def _span(parts: Sequence[slice | None]) -> slice | None:
    """The smallest slice that holds all `parts`; None if there are none."""
    held = [rows for rows in parts if rows is not None]
    return slice(min(r.start for r in held), max(r.stop for r in held)) if held else None


def _empty_block(k: Tensor, rows: slice | None) -> Tensor | None:
    """Room for `rows` of a block like k [b, h_kv, s, d]."""
    if rows is None:
        return None
    shape = (rows.stop - rows.start, *block_shape(k)[1:])
    return k.new_empty(shape)
