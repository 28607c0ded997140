"""The interface of the flash_attn package on torch's own kernels, so that peers run as published.

Tensors are flash_attn's: [b, s, h, d], packed [tokens, h, d]; lse [b, h, s], packed [h, tokens].
Only what ring-flash-attn and yunchang call: no dropout, no window, no ALiBi. torch's operators
return gradients where flash_attn writes them into given tensors; the copy takes under a hundredth
of the time. `install` changes nothing where flash_attn itself can be imported.
"""

import importlib.util
import sys
import types
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

aten = torch.ops.aten


def install() -> str:
    """Make `import flash_attn` work; returns what it will find."""
    if "flash_attn" not in sys.modules and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn itself"
    package = types.ModuleType("flash_attn")
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    for function in (forward, backward, varlen_forward, varlen_backward):
        setattr(interface, f"_flash_attn_{function.__name__}", function)
    package.flash_attn_interface = interface
    package.flash_attn_func = None  # imported by yunchang, called only without a ring
    package.__version__ = "2.8.3"
    sys.modules["flash_attn"] = package
    sys.modules["flash_attn.flash_attn_interface"] = interface
    return "torch's flash kernels behind flash_attn's interface"


@contextmanager
def flash_impl(name: str | None):
    """torch's flash operators on FA3 or FA4, or on their own kernel (None); back afterwards."""
    attention = torch.nn.attention
    before = getattr(attention, "current_flash_attention_impl", lambda: None)()
    if before == name:
        yield
        return
    _activate(name)
    try:
        yield
    finally:
        _activate(before)


def _activate(name: str | None) -> None:
    if name is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(name)


@cache
def _no_random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a random generator that nothing reads: there is no dropout."""
    return (torch.zeros(2, dtype=torch.uint64, device=device),
            torch.zeros((), dtype=torch.uint64, device=device))  # fmt: skip


def forward(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1,
    window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
):  # fmt: skip
    """out, lse, None, None."""
    if not q.is_cuda:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=softmax_scale
        )
        return out.transpose(1, 2).contiguous(), lse.contiguous(), None, None
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale
    )
    return out, lse, None, None


def backward(
    dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    deterministic=False, rng_state=None,
):  # fmt: skip
    """Writes dq, dk and dv."""
    if q.is_cuda:
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0,
            causal, *_no_random_state(q.device), scale=softmax_scale,
        )  # fmt: skip
    else:
        heads_first = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads_first, softmax_lse.contiguous(), 0.0, causal, scale=softmax_scale
        )
        grads = [t.transpose(1, 2) for t in grads]
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)


def varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
    zero_tensors=False,
):  # fmt: skip
    """out, lse, None, None; causal is aligned at the last query and key of each document."""
    if q.is_cuda:
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), 0.0, causal,
            False, scale=softmax_scale,
        )  # fmt: skip
        return out, lse, None, None
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        heads_first = [t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])]
        mask = _bottom_right(rows, keys, q.dtype) if causal else None
        part, part_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, 0.0, False, attn_mask=mask, scale=softmax_scale
        )
        out[rows], lse[:, rows] = part[0].transpose(0, 1), part_lse[0]
    return out, lse, None, None


def varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1,
    window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    """Writes dq, dk and dv."""
    if q.is_cuda:
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q),
            int(max_seqlen_k), 0.0, causal, *_no_random_state(q.device), scale=softmax_scale,
        )  # fmt: skip
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)
        return
    for rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        mask = _bottom_right(rows, keys, q.dtype) if causal else None
        parts = (dout[rows], q[rows], k[keys], v[keys], out[rows])
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.transpose(0, 1)[None] for t in parts), softmax_lse[:, rows][None].contiguous(), 0.0,
            False, attn_mask=mask, scale=softmax_scale,
        )  # fmt: skip
        for target, at, grad in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
            target[at] = grad[0].transpose(0, 1)


def _documents(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor):
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        yield slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])


def _bottom_right(rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    num_q, num_k = rows.stop - rows.start, keys.stop - keys.start
    future = torch.ones(num_q, num_k, dtype=torch.bool).triu(1 + num_k - num_q)
    return torch.zeros(num_q, num_k, dtype=dtype).masked_fill(future, float("-inf"))
