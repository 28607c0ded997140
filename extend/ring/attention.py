"""Attention over a sequence that is spread over the ranks of a process group.

Shapes: b batch, h query heads, h_kv key and value heads, s local length, d head_dim. Every rank
holds the positions that the layout gives it. A strategy decides what travels: keys and values to
the queries, or heads in exchange for rows. A rank saves tensors of its local size only; with
Ulysses on more ranks than key heads that of keys which are repeated. Where keys travel to queries,
the backward pass fetches them once more.

Source: Ring Attention, arXiv:2310.01889; the backward pass from the global out and lse is that of
FlashAttention-2, arXiv:2307.08691, Alg. 2, cut into blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable loads Dynamo: a second
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from extend.errors import CompatibilityError
from extend.registry import lookup
from extend.ring.agreement import agree_on_call, agree_on_kernel, sum_over
from extend.ring.call import Call
from extend.ring.choose import choose_strategy, gpu_kind
from extend.ring.comm import RingComm
from extend.ring.keep import Kept
from extend.ring.kernels import choose_kernel
from extend.ring.layouts import LAYOUTS, check_length
from extend.ring.mask import Mask, make_mask
from extend.ring.strategies import Strategy, build_strategy, parse_strategy

CAUSAL_MASK = Mask()


@_disable_dynamo  # torch.compile breaks its graph here: what ranks agree on cannot be traced
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: ProcessGroup | None = None,
    layout: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    softmax_scale: float | None = None,
    kernel: str = "auto",
    strategy: str = "auto",
) -> Tensor:
    """Return the attention of the local queries [b, h, s, d] to the keys of all ranks.

    Differentiable once; gradients have the dtype of their input, and sums of more than two shares
    are fp32. Every rank of the group must call it, with tensors of the same shape and the same
    options. Under autocast q, k and v are cast as torch's own attention casts them.

    Args:
        q: local queries [b, h, s, d], rotated with their global positions.
        k: local keys [b, h_kv, s, d]; h must be a multiple of h_kv.
        v: local values [b, h_kv, s, d].
        group: the ranks that share the sequence; None is the default group, or this process
            alone where there is none.
        layout: a name in LAYOUTS: which positions a rank holds (see `shard`).
        causal: a query sees the keys at its own and earlier positions; else it sees all keys.
        window: a query sees its own position and the `window - 1` before it.
        cu_seqlens: where documents begin in the whole sequence, from 0 to its length; a query
            sees keys of its own document only. A tensor on a GPU is waited for.
        softmax_scale: factor on the scores; None is 1 / sqrt(d).
        kernel: a name in KERNELS, or "auto" for the fastest that takes these tensors.
        strategy: a name in STRATEGIES (some with a number, as "usp:4"), or "auto".

    Raises:
        LayoutError: the local length does not fit the layout.
        CompatibilityError: shapes, dtypes or ranks disagree, no kernel takes these tensors, or the
            strategy cannot split their heads.
        RankError: a rank does not take part.
        RecipeError: no such layout, kernel or strategy.
    """
    comm = RingComm(group)
    _check_shapes(q, k, v)
    mask = make_mask(causal, window, cu_seqlens, q.shape[2] * comm.world)
    return attend(
        q, k, v, comm=comm, layout=layout, mask=mask, softmax_scale=softmax_scale,
        kernel=kernel, strategy=strategy,
    )  # fmt: skip


@_disable_dynamo
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    comm: RingComm,
    layout: str = "zigzag",
    mask: Mask = CAUSAL_MASK,
    softmax_scale: float | None = None,
    kernel: str = "auto",
    strategy: str = "auto",
    kept: Kept | None = None,
) -> Tensor:
    """`ring_attention` for callers that hold a RingComm and a Mask, such as a ring of one.

    Args:
        kept: takes what attention gives on its first run, and spares the second one its attention.
    """
    q, k, v = _autocast(q, k, v)
    _check_shapes(q, k, v)
    _check_kind(q, k, v)
    _check_names(layout, strategy)
    q, k, v = _last_dim_dense(q), _last_dim_dense(k), _last_dim_dense(v)
    seq_len = q.shape[2] * comm.world
    check_length(seq_len, layout, comm.world)
    agree_on_call(
        comm, q=tuple(q.shape), k=tuple(k.shape), dtype=str(q.dtype), layout=layout, mask=mask,
        kernel=kernel, strategy=strategy, softmax_scale=softmax_scale,
        # "auto" depends on it, and all ranks must choose alike.
        gpu=gpu_kind(q.device) if strategy == "auto" else None,
    )  # fmt: skip
    call = Call(
        comm=comm, layout=layout, mask=mask, seq_len=seq_len,
        kernel=choose_kernel(kernel, q, k, mask=mask, group=comm.ranks,
                             agree=lambda times: sum_over(comm, times)),
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
    )  # fmt: skip
    agree_on_kernel(
        comm, kernel=kernel, takes_bands=call.kernel.bands, takes_documents=call.kernel.packed
    )
    if strategy == "auto":
        strategy = choose_strategy(call, q, k).name
    return _Attention.apply(q, k, v, build_strategy(strategy, call, q, k), kept)


class _Attention(torch.autograd.Function):
    """Any strategy as one differentiable function."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, kept: Kept | None
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # for `reference`: products in fp32
            out, saved = _run(strategy, q, k, v, kept)
        ctx.save_for_backward(*saved)
        ctx.strategy = strategy
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        with torch.autocast(dout.device.type, enabled=False):
            return *ctx.strategy.backward(_last_dim_dense(dout), ctx.saved_tensors), None, None


def _run(
    strategy: Strategy, q: Tensor, k: Tensor, v: Tensor, kept: Kept | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if kept is not None and kept.again:
        return strategy.resume(q, k, v, kept.take())
    out, saved = strategy.forward(q, k, v)
    if kept is not None:
        kept.put(strategy.kept(saved))
    return out, saved


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


def _check_names(layout: str, strategy: str) -> None:
    lookup(LAYOUTS, layout, "layout")
    parse_strategy(strategy)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fit = q.ndim == 4 and k.shape == v.shape == (q.shape[0], *k.shape[1:2], *q.shape[2:])
    if not fit:
        raise CompatibilityError(
            f"ring_attention: {shapes} do not fit; "
            "pass q [b, h, s, d] and k, v [b, h_kv, s, d] of the same local length"
        )
    if not all((q.shape[0], q.shape[1], k.shape[1], q.shape[3])):
        raise CompatibilityError(
            f"ring_attention: {shapes} hold nothing; batch, heads and head_dim must be at least 1"
        )
    if q.shape[1] % k.shape[1]:
        raise CompatibilityError(
            f"ring_attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} "
            f"key heads ({shapes})"
        )


def _check_kind(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise CompatibilityError(
            f"ring_attention: q {q.dtype} on {q.device}, k {k.dtype} on {k.device}, "
            f"v {v.dtype} on {v.device}; cast and move them to one dtype and device"
        )
    if not q.is_floating_point():
        raise CompatibilityError(
            f"ring_attention: q, k and v of {q.dtype}; cast them to a floating-point dtype"
        )
