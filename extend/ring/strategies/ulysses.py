"""Ulysses: trade the split of the sequence for a split of the heads, and back.

An all-to-all gives each rank of a group all of the group's rows for its share of the heads, in the
order of their positions. What is computed there is a strategy of its own: nothing but kernel calls
when the group is everybody, a ring over the groups otherwise (USP, unified sequence parallelism).
With more ranks than key heads, key heads are repeated, and their gradients summed.

Source: DeepSpeed Ulysses, arXiv:2309.14509; USP, arXiv:2405.07719.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from extend.ring.comm import RingComm
from extend.ring.layouts import union


class Strategy(Protocol):
    """A way to compute attention over ranks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out [b, h, s, d] of the local queries, and the tensors that `backward` needs."""
        ...

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the local q, k, v."""
        ...


class Ulysses:
    """Heads split over the ranks of `comm`, which hold `members` of the layout's `world` parts."""

    def __init__(
        self, comm: RingComm, inner: Strategy, layout: str, seq_len: int,
        members: tuple[int, ...], world: int, num_kv_heads: int,
    ):  # fmt: skip
        """`inner` computes attention of what the group holds together, for a share of the heads."""
        self.comm, self.inner, self._num_kv_heads = comm, inner, num_kv_heads
        self._places = union(layout, seq_len, members, world).places
        self._local_len = seq_len // world

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out [b, h, s, d] of the local queries, and what `backward` needs."""
        k, v = self._repeat(k), self._repeat(v)
        gathered = self._to_heads("queries and keys", (q, k, v))
        out, saved = self.inner.forward(*gathered)
        (out,) = self._to_rows("out", (out,))
        return out, saved

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the local q, k, v."""
        (dout,) = self._to_heads("dout", (dout,))
        dq, dk, dv = self._to_rows("gradients", self.inner.backward(dout, saved))
        return dq, _sum_repeated(dk, self._num_kv_heads), _sum_repeated(dv, self._num_kv_heads)

    def _repeat(self, k: Tensor) -> Tensor:
        """Key heads [b, h_kv, s, d], repeated until they can be shared out evenly."""
        times = math.lcm(k.shape[1], self.comm.world) // k.shape[1]
        return k.repeat_interleave(times, dim=1) if times > 1 else k

    def _to_heads(self, lane: str, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """[b, h, s, d] each -> [b, h / ranks, rows of the group, d], rows by position."""
        world, like = self.comm.world, tensors[0]
        batch, _, rows, head_dim = like.shape
        heads = [t.shape[1] // world for t in tensors]

        def write(buffer: Tensor) -> None:  # [ranks, s, b, heads of all tensors, d]
            for part, t in zip(buffer.split(heads, dim=3), tensors, strict=True):
                part.copy_(t.unflatten(1, (world, -1)).permute(1, 3, 0, 2, 4))

        shape = (world, rows, batch, sum(heads), head_dim)
        window = self.comm.publish(lane, shape, like, write)
        whole = like.new_empty((world * rows, *shape[2:]))

        def place(sender: int, index: int) -> tuple[slice, slice] | None:
            return _nth(self._places[sender], index)

        fetches = []
        for step, index in self._pieces():
            found = place((self.comm.rank - step) % world, index)

            def select(buffer: Tensor, receiver: int, step=step, index=index) -> Tensor | None:
                found = place((receiver - step) % world, index)
                return None if found is None else buffer[receiver][found[0]]

            fetches.append((step, None if found is None else whole[found[1]], select))
        self.comm.fetch_all(window, fetches).wait()
        return [part.permute(1, 2, 0, 3) for part in whole.split(heads, dim=2)]

    def _to_rows(self, lane: str, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """The way back: [b, h / ranks, rows of the group, d] each -> [b, h, s, d]."""
        world, like = self.comm.world, tensors[0]
        batch, _, rows, head_dim = like.shape
        heads = [t.shape[1] for t in tensors]

        def write(buffer: Tensor) -> None:  # [rows of the group, b, heads of all tensors, d]
            for part, t in zip(buffer.split(heads, dim=2), tensors, strict=True):
                part.copy_(t.permute(2, 0, 1, 3))

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
        self.comm.fetch_all(window, fetches).wait()
        return [
            part.permute(2, 0, 3, 1, 4).flatten(1, 2) for part in parts.split(heads, dim=3)
        ]

    def _pieces(self) -> list[tuple[int, int]]:
        """(step, index) of every piece that may travel; the same on all ranks."""
        most = max(map(len, self._places))
        return [(step, index) for step in range(self.comm.world) for index in range(most)]


def _nth(places: tuple[tuple[slice, slice], ...], index: int) -> tuple[slice, slice] | None:
    return places[index] if index < len(places) else None


def _sum_repeated(gradient: Tensor, num_kv_heads: int) -> Tensor:
    """Sum the gradients [b, n, s, d] of repeated key heads to [b, h_kv, s, d], in fp32."""
    if gradient.shape[1] == num_kv_heads:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    parts = gradient.unflatten(1, (num_kv_heads, -1))
    return parts.sum(dim=2, dtype=wide).to(gradient.dtype)
