"""Attention over a sequence that is spread over the ranks of a process group.

Shapes: b batch, h query heads, h_kv key and value heads, s local length, d head_dim. Every rank
holds the positions that the layout gives it; keys and values travel, queries stay. Memory is that
of the local length: a rank saves its q, k, v, out and lse, and the backward pass sends the keys
around once more.

Source: Ring Attention, arXiv:2310.01889; the backward pass from the global out and lse is that of
FlashAttention-2, arXiv:2307.08691, Alg. 2, cut into blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from extend.errors import CompatibilityError
from extend.registry import lookup
from extend.ring.comm import GradientHops, RingComm, circulate
from extend.ring.kernels import Kernel, choose_kernel
from extend.ring.layouts import LAYOUTS, check_length
from extend.ring.lse import merge_partial
from extend.ring.schedule import Schedule


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: ProcessGroup | None = None,
    layout: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Return the attention of the local queries [b, h, s, d] to the keys of all ranks.

    Differentiable once; gradients have the dtype of their input and are summed in fp32. Every
    rank of the group must call it, with tensors of the same shape. Under autocast q, k and v are
    cast as torch's own attention casts them.

    Args:
        q: local queries [b, h, s, d], rotated with their global positions.
        k: local keys [b, h_kv, s, d]; h must be a multiple of h_kv.
        v: local values [b, h_kv, s, d].
        group: the ranks that share the sequence; None is the default group, or this process
            alone where there is none.
        layout: a name in LAYOUTS: which positions a rank holds (see `shard`).
        causal: a query sees the keys at its own and earlier positions; else it sees all keys.
        window: refused in this version.
        cu_seqlens: refused in this version.
        softmax_scale: factor on the scores; None is 1 / sqrt(d).
        kernel: a name in KERNELS, or "auto" for the fastest that takes these tensors.

    Raises:
        LayoutError: the local length does not fit the layout.
        CompatibilityError: shapes or dtypes disagree, or no kernel takes these tensors.
        RecipeError: no such layout or kernel.
    """
    for name, value in (("window", window), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            raise CompatibilityError(
                f"ring_attention: {name} is not supported yet by kernel {kernel!r}; "
                f"pass {name}=None (full attention over one document)"
            )
    return attend(
        q, k, v, comm=RingComm(group), layout=layout, causal=causal,
        softmax_scale=softmax_scale, kernel=kernel,
    )  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    comm: RingComm,
    layout: str,
    causal: bool,
    softmax_scale: float | None,
    kernel: str,
) -> Tensor:
    """`ring_attention` for callers that hold a RingComm, such as a ring of one."""
    q, k, v = _autocast(q, k, v)
    _check_shapes(q, k, v)
    q, k, v = _last_dim_dense(q), _last_dim_dense(k), _last_dim_dense(v)
    lookup(LAYOUTS, layout, "layout")
    local_len = q.shape[2]
    check_length(local_len * comm.world, layout, comm.world)
    ring = Ring(
        comm=comm,
        schedule=Schedule(LAYOUTS[layout], comm.rank, comm.world, local_len, causal),
        kernel=choose_kernel(kernel, q, k),
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
    )
    return RingAttention.apply(q, k, v, ring)


@dataclass(frozen=True)
class Ring:
    """Everything about one call that is not a tensor."""

    comm: RingComm
    schedule: Schedule
    kernel: Kernel
    softmax_scale: float


class RingAttention(torch.autograd.Function):
    """One loop for every layout, kernel and world size; saves local tensors only."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        out, lse = _forward(q, k, v, ring)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _backward(_last_dim_dense(dout), q, k, v, out, lse, ctx.ring)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    """out [b, h, s, d] in q's dtype and its lse [b, h, s] over the keys of all ranks."""
    out, lse = None, None
    for step, keys, values in circulate(ring.comm, ring.schedule, k, v):
        block = ring.schedule.block(step)
        if block is None:
            continue
        block_out, block_lse = ring.kernel.forward(
            q[:, :, block.q], keys[:, :, block.kv], values[:, :, block.kv],
            causal=block.causal, softmax_scale=ring.softmax_scale,
        )  # fmt: skip
        if out is None:  # step 0: every query, against the keys of this rank
            out, lse = block_out, block_lse
            continue
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        merge_partial(out[:, :, block.q], lse[:, :, block.q], block_out, block_lse)
    return out.to(q.dtype), lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the local q, k, v: in fp32, or as the kernel gives them in a ring of one.

    A block's backward pass from the *global* out and lse gives exactly that block's share of the
    gradients, so the shares only need adding up.
    """
    if ring.comm.world == 1:
        block = ring.schedule.block(0)
        return ring.kernel.backward(
            dout, q, k, v, out, lse, causal=block.causal, softmax_scale=ring.softmax_scale
        )
    dq = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    hops = GradientHops(ring.comm, ring.schedule, k)
    for step, keys, values in circulate(ring.comm, ring.schedule, k, v):
        block, dk, dv = ring.schedule.block(step), None, None
        if block is not None:
            block_dq, dk, dv = ring.kernel.backward(
                dout[:, :, block.q], q[:, :, block.q], keys[:, :, block.kv],
                values[:, :, block.kv], out[:, :, block.q], lse[:, :, block.q],
                causal=block.causal, softmax_scale=ring.softmax_scale,
            )  # fmt: skip
            dq[:, :, block.q] += block_dq
        hops.add(step, block, dk, dv)
    return dq, *hops.finish()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast would: rotated q and k are often fp32 where v is already bf16."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def _last_dim_dense(t: Tensor) -> Tensor:
    """Kernels want the last dimension contiguous; the gradient of a sum, for one, is not."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fit = q.ndim == 4 and k.shape == v.shape == (q.shape[0], *k.shape[1:2], *q.shape[2:])
    if not fit:
        raise CompatibilityError(
            f"ring_attention: {shapes} do not fit; "
            "pass q [b, h, s, d] and k, v [b, h_kv, s, d] of the same local length"
        )
    if q.shape[1] % k.shape[1]:
        raise CompatibilityError(
            f"ring_attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} "
            f"key heads ({shapes})"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise CompatibilityError(
            f"ring_attention: q {q.dtype} on {q.device}, k {k.dtype} on {k.device}, "
            f"v {v.dtype} on {v.device}; cast and move them to one dtype and device"
        )
