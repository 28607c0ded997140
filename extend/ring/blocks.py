"""Keys and values on the way: K and V in one buffer, rows outermost.

A block is [rows, 2, b, h_kv, d]: any range of rows is one piece of memory, so that a part of a block
travels as cheaply as all of it. Kernels read K and V out of it through strides, without a copy.
"""

import torch
from torch import Tensor

from extend.ring.comm import RingComm, Window


def block_shape(k: Tensor) -> tuple[int, ...]:
    """The shape of a block that holds k [b, h_kv, rows, d] and its values."""
    batch, num_kv_heads, rows, head_dim = k.shape
    return rows, 2, batch, num_kv_heads, head_dim


def fill_block(block: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k, v [b, h_kv, n, d] into the first n rows of `block`."""
    rows = k.shape[2]
    block[:rows, 0].copy_(k.permute(2, 0, 1, 3))
    block[:rows, 1].copy_(v.permute(2, 0, 1, 3))


def open_block(block: Tensor) -> tuple[Tensor, Tensor]:
    """Views k, v [b, h_kv, rows, d] of a block."""
    return block[:, 0].permute(1, 2, 0, 3), block[:, 1].permute(1, 2, 0, 3)


def publish_block(comm: RingComm, lane: str, like: Tensor, k: Tensor | None, v: Tensor | None) -> Window:
    """Offer k and v (None: nothing of use) in a block as large as for `like` [b, h_kv, s, d]."""
    write = (lambda block: fill_block(block, k, v)) if k is not None else (lambda block: None)
    return comm.publish(lane, block_shape(like), like, write)


class KeySum:
    """dk and dv [b, h_kv, s, d] of this rank's own keys, from the shares of several ranks.

    One share more than the own is added in the dtype of the keys, rounding once; several are summed
    in fp32.
    """

    def __init__(self, k: Tensor, num_arrivals: int):
        wide = torch.promote_types(k.dtype, torch.float32)
        self._dtype = wide if num_arrivals > 1 else k.dtype
        self._k = k
        self._sums: tuple[Tensor, Tensor] | None = None

    def add_own(self, dk: Tensor, dv: Tensor, heads: slice | None = None) -> None:
        """Add the share of this rank's own queries, of all key heads or of `heads`."""
        if self._sums is None and dk.shape == self._k.shape:
            self._sums = dk.to(self._dtype), dv.to(self._dtype)
            return
        for total, share in zip(self._get(), (dk, dv), strict=True):
            (total if heads is None else total[:, heads]).add_(share)

    def add_block(self, rows: slice, block: Tensor, heads: slice | None = None) -> None:
        """Add what arrived for `rows`: a block [rows, 2, b, h_kv, d]."""
        for total, share in zip(self._get(), open_block(block), strict=True):
            (total if heads is None else total[:, heads])[:, :, rows].add_(share)

    def result(self) -> tuple[Tensor, Tensor]:
        """dk, dv in the dtype of the keys."""
        dk, dv = self._get()
        return dk.to(self._k.dtype), dv.to(self._k.dtype)

    def _get(self) -> tuple[Tensor, Tensor]:
        if self._sums is None:
            shape, device = self._k.shape, self._k.device
            self._sums = tuple(
                torch.zeros(shape, dtype=self._dtype, device=device) for _ in range(2)
            )
        return self._sums


def split_heads(k: Tensor, num_heads: int, world: int) -> list[tuple[slice, slice]]:
    """(query heads, key heads) of the portions in which a rank does its own part of a backward pass.

    Two halves of k [b, h_kv, s, d]'s heads where that helps: half of it before the others' keys and
    half after them hides the first fetch behind the one and the way home of the last gradients
    behind the other.
    """
    num_kv_heads = k.shape[1]
    group, cut = num_heads // num_kv_heads, num_kv_heads // 2 if world > 1 else 0
    cuts = [(0, cut), (cut, num_kv_heads)] if cut else [(0, num_kv_heads)]
    return [(slice(a * group, b * group), slice(a, b)) for a, b in cuts]
