"""Ulysses: trade the split of the sequence for a split of the heads, and back.

An all-to-all gives each rank of a group all of the group's rows for its share of the heads, in the
order of their positions. What is computed there is a strategy of its own: nothing but kernel calls
when the group is everybody, a ring over the groups otherwise (USP, unified sequence parallelism).
With more ranks than key heads, key heads are repeated, and their gradients summed.

Source: DeepSpeed Ulysses, arXiv:2309.14509; USP, arXiv:2405.07719.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from extend.ring.comm import RingComm
from extend.ring.layouts import union
from extend.ring.lse import write_sum

Arrive = Callable[[], list[Tensor]]  # waits for tensors under way

# Rows times query heads of one group that keep a GPU of today busy, with little lost at the end.
GROUP_ROWS = 1 << 19
MOST_GROUPS = 4


class Strategy(Protocol):
    """A way to compute attention over ranks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out [b, h, s, d] of the local queries, and the tensors that `backward` needs."""
        ...

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the local q, k, v."""
        ...

    def kept(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Those of the saved tensors that attention alone gives: out and lse."""
        ...

    def resume(
        self, q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `forward` returns, from what was kept: no attention is computed again."""
        ...


class Ulysses:
    """Heads split over the ranks of `comm`, which hold `members` of the layout's `world` parts.

    A rank's share goes and comes in two groups of heads, if it can be halved, one on its way while
    another is computed; in more where the sequence is long, so that less of the first group's way
    and of the last one's is left to wait for.
    """

    def __init__(
        self, comm: RingComm, inner: Strategy, layout: str, seq_len: int,
        members: tuple[int, ...], world: int, num_heads: int, num_kv_heads: int,
    ):  # fmt: skip
        """`inner` computes attention of what the group holds together, for a share of the heads."""
        self.comm, self.inner, self._num_kv_heads = comm, inner, num_kv_heads
        self._places = union(layout, seq_len, members, world).places
        self._local_len = seq_len // world
        repeated = math.lcm(num_kv_heads, comm.world)
        self._times = repeated // num_kv_heads
        # A rank computes the rows of all for its share of the heads.
        self._groups = num_groups(repeated // comm.world, self._local_len * num_heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out [b, h, s, d] of the local queries, and what `backward` needs."""
        return self._exchange(q, k, v, lambda group, tensors: self.inner.forward(*tensors))

    def kept(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t for part in self._split(saved) for t in self.inner.kept(part))

    def resume(
        self, q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        parts = self._split(kept)
        return self._exchange(
            q, k, v, lambda group, tensors: self.inner.resume(*tensors, parts[group])
        )

    def _split(self, saved: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The tensors of each group of heads."""
        count = len(saved) // self._groups
        return [saved[i : i + count] for i in range(0, len(saved), count)]

    def _exchange(
        self, q: Tensor, k: Tensor, v: Tensor, compute: Callable
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Heads out and rows back; `compute(group, [q, k, v])` returns out and what to save."""
        saved, leaving = [], []
        for group, arrive in enumerate(self._all_to_heads("q, k, v", q, self._repeat(k),
                                                          self._repeat(v))):  # fmt: skip
            out, some = compute(group, arrive())
            leaving.append(self._to_rows(f"out {group}", (out,)))
            saved += some
        (out,) = self._join([arrive() for arrive in leaving])
        return out, tuple(saved)

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the local q, k, v."""
        leaving, parts = [], self._split(saved)
        for group, arrive in enumerate(self._all_to_heads("dout", dout)):
            gradients = self.inner.backward(*arrive(), parts[group])
            leaving.append(self._to_rows(f"gradients {group}", gradients))
        dq, dk, dv = self._join([arrive() for arrive in leaving])
        return dq, _sum_repeated(dk, self._num_kv_heads), _sum_repeated(dv, self._num_kv_heads)

    def _repeat(self, k: Tensor) -> Tensor:
        """Key heads [b, h_kv, s, d], repeated until they can be shared out evenly."""
        return k.repeat_interleave(self._times, dim=1) if self._times > 1 else k

    def _all_to_heads(self, lane: str, *tensors: Tensor) -> list[Arrive]:
        """Start the way of all groups' heads of [b, h, s, d] each."""
        apart = [t.unflatten(1, (self.comm.world, self._groups, -1)) for t in tensors]
        return [
            self._to_heads(f"{lane} {group}", [t[:, :, group] for t in apart])
            for group in range(self._groups)
        ]

    def _to_heads(self, lane: str, tensors: Sequence[Tensor]) -> Arrive:
        """[b, ranks, heads, s, d] each -> [b, heads, rows of the group, d], by position."""
        world, like = self.comm.world, tensors[0]
        batch, _, _, rows, head_dim = like.shape
        heads = [t.shape[2] for t in tensors]

        def write(buffer: Tensor) -> None:  # [ranks, s, b, heads of all tensors, d]
            for part, t in zip(buffer.split(heads, dim=3), tensors, strict=True):
                for row in range(batch):  # ranks take the place of the batch: one kernel for all
                    write_sum(part[:, :, row].transpose(1, 2), t[row])

        shape = (world, rows, batch, sum(heads), head_dim)
        window = self.comm.publish(lane, shape, like, write)
        whole = like.new_empty((world * rows, *shape[2:]))
        fetches = []
        for step, index in self._pieces():
            found = _nth(self._places[(self.comm.rank - step) % world], index)

            def select(buffer: Tensor, receiver: int, step=step, index=index) -> Tensor | None:
                found = _nth(self._places[(receiver - step) % world], index)
                return None if found is None else buffer[receiver][found[0]]

            fetches.append((step, None if found is None else whole[found[1]], select))
        transfer = window.fetch_all(fetches)
        window.close()

        def arrive() -> list[Tensor]:
            transfer.wait()
            return [part.permute(1, 2, 0, 3) for part in whole.split(heads, dim=2)]

        return arrive

    def _to_rows(self, lane: str, tensors: Sequence[Tensor]) -> Arrive:
        """The way back: [b, heads, rows of the group, d] each -> [ranks, b, heads, s, d]."""
        world, like = self.comm.world, tensors[0]
        batch, _, rows, head_dim = like.shape
        heads = [t.shape[1] for t in tensors]

        def write(buffer: Tensor) -> None:  # [rows of the group, b, heads of all tensors, d]
            for part, t in zip(buffer.split(heads, dim=2), tensors, strict=True):
                write_sum(part.permute(1, 2, 0, 3), t)

        window = self.comm.publish(lane, (rows, batch, sum(heads), head_dim), like, write)
        parts = like.new_empty((world, self._local_len, batch, sum(heads), head_dim))
        fetches = []
        for step, index in self._pieces():
            found = _nth(self._places[self.comm.rank], index)

            def select(buffer: Tensor, receiver: int, index=index) -> Tensor | None:
                found = _nth(self._places[receiver], index)
                return None if found is None else buffer[found[1]]

            into = None if found is None else parts[(self.comm.rank - step) % world][found[0]]
            fetches.append((step, into, select))
        transfer = window.fetch_all(fetches)
        window.close()

        def arrive() -> list[Tensor]:
            transfer.wait()
            return [part.permute(0, 2, 3, 1, 4) for part in parts.split(heads, dim=3)]

        return arrive

    def _join(self, groups: list[list[Tensor]]) -> list[Tensor]:
        """The groups' [ranks, b, heads, s, d] of each tensor as one [b, h, s, d]."""
        return [self._interleave(parts) for parts in zip(*groups, strict=True)]

    def _interleave(self, parts: Sequence[Tensor]) -> Tensor:
        world, batch, heads, rows, head_dim = parts[0].shape
        # In memory [b, s, h, d], as models have it.
        whole = parts[0].new_empty((batch, rows, world, len(parts), heads, head_dim))
        for group, part in enumerate(parts):
            for row in range(batch):
                write_sum(whole[row, :, :, group].permute(1, 2, 0, 3), part[:, row])
        return whole.flatten(2, 4).transpose(1, 2)

    def _pieces(self) -> list[tuple[int, int]]:
        """(step, index) of every piece that may travel; the same on all ranks."""
        most = max(map(len, self._places))
        return [(step, index) for step in range(self.comm.world) for index in range(most)]


def num_groups(kv_heads: int, rows: int) -> int:
    """Into how many groups `kv_heads` are split, whose queries have `rows` rows in all heads."""
    wanted = min(max(rows // GROUP_ROWS, 2), MOST_GROUPS)
    return next(n for n in range(wanted, 0, -1) if kv_heads % n == 0)


def _nth(places: tuple[tuple[slice, slice], ...], index: int) -> tuple[slice, slice] | None:
    return places[index] if index < len(places) else None


def _sum_repeated(gradient: Tensor, num_kv_heads: int) -> Tensor:
    """Sum the gradients [b, n, s, d] of repeated key heads to [b, h_kv, s, d], in fp32."""
    if gradient.shape[1] == num_kv_heads:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    parts = gradient.unflatten(1, (num_kv_heads, -1))
    return parts.sum(dim=2, dtype=wide).to(gradient.dtype)
