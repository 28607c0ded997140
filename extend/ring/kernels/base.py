"""What a kernel is, and what several kernels share.

Shapes: b batch, h query heads, h_kv key and value heads, sq and sk rows of a tile, d head_dim.
"""

from typing import Protocol

import torch
from torch import Tensor

from extend.ring.mask import ANTICAUSAL, CAUSAL, FULL, TileMask

HALF = (torch.float16, torch.bfloat16)


class Kernel(Protocol):
    """One way to compute attention over a tile. Add one: a small class, one line in KERNELS.

    Every kernel takes full rectangles, causal squares and anti-causal squares; two properties say
    what else. Tensors may be slices of larger ones with any strides (keys and values often lie side
    by side in one buffer); only their last dimension is contiguous. Every query row of a tile sees
    a key.
    """

    @property
    def bands(self) -> bool:
        """Takes any bounds (lo, hi), in rectangles too."""
        ...

    @property
    def packed(self) -> bool:
        """Takes documents side by side (cu_seqlens) in one call."""
        ...

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        """Why this kernel does not take tensors like these, or None if it does."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention over the keys of this tile alone.

        Args:
            q: [b, h, sq, d].
            k, v: [b, h_kv, sk, d]; h is a multiple of h_kv.

        Returns:
            out [b, h, sq, d] in q's dtype; lse [b, h, sq], the natural logarithm of the softmax
            sum, fp32 (fp64 for fp64).
        """
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, mask: TileMask, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The share of this tile in dq, dk and dv, in the dtypes and shapes of q, k and v.

        `out` and `lse` are those over *all* keys of the queries, not over this tile's.
        """
        ...


def square(mask: TileMask, q: Tensor, k: Tensor) -> tuple[bool, bool]:
    """(causal, turn): how a kernel that knows rectangles and causal squares computes a tile.

    `turn`: the tile is an anti-causal square; with the order of all rows reversed it is causal.

    Raises:
        ValueError: neither; the tile needs a kernel that takes bands or documents.
    """
    rows = q.shape[2], k.shape[2]
    if mask == FULL:
        return False, False
    if mask in (CAUSAL, ANTICAUSAL) and rows[0] == rows[1]:
        return True, mask == ANTICAUSAL
    raise ValueError(
        f"a tile of {rows[0]} x {rows[1]} rows with {mask} for a kernel that takes rectangles and "
        "causal squares; cut the tiles with fit_tiles for what the kernel takes (bands, packed)"
    )


def turned(turn: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [b, h, s] or [b, h, s, d] with their rows in reverse order, if `turn` is set."""
    return tuple(t.flip(2) for t in tensors) if turn else tensors


def expand_groups(t: Tensor, num_heads: int) -> Tensor:
    """Repeat key or value heads [b, h_kv, s, d] so that each query head has its own."""
    return t if t.shape[1] == num_heads else t.repeat_interleave(num_heads // t.shape[1], dim=1)


def sum_groups(t: Tensor, num_kv_heads: int) -> Tensor:
    """The adjoint of `expand_groups`: sum gradients [b, h, s, d] over the heads of a group."""
    return t if t.shape[1] == num_kv_heads else t.unflatten(1, (num_kv_heads, -1)).sum(dim=2)


def wrong_device(q: Tensor, device: str) -> str | None:
    return None if q.device.type == device else f"runs on {device}"


def wrong_dtype(q: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    return None if q.dtype in dtypes else f"takes {names}"


def wrong_head_dim(q: Tensor, multiple: int, limit: int | None = None) -> str | None:
    head_dim = q.shape[-1]
    if head_dim % multiple == 0 and (limit is None or head_dim <= limit):
        return None
    most = "" if limit is None else f" and at most {limit}"
    return f"takes a head_dim that is a multiple of {multiple}{most}, not {head_dim}"
