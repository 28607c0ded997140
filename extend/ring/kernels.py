"""Attention of one block: the kernels that the ring runs at every step.

Forward: q [b, h, sq, d] and k, v [b, h_kv, sk, d] -> out [b, h, sq, d] in q's dtype and lse
[b, h, sq], natural logarithm, fp32. Backward: from the out and lse of *all* keys, the share of
this block in dq, dk and dv, in the dtypes of q, k and v. A causal block is square. Inputs may be
slices of larger tensors; their last dimension is contiguous.

A kernel also says why it does not take given tensors, so that "auto" and an error message rest on
the same answer.
"""

from typing import Protocol

import torch
from torch import Tensor

from extend.errors import CompatibilityError
from extend.registry import lookup

aten = torch.ops.aten

HALF = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)


class Kernel(Protocol):
    """One way to compute a block. Add one: a small class, one line in KERNELS."""

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        """Why this kernel does not take tensors like these, or None if it does."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse of this block alone."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, causal: bool, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk and dv of this block, given out and lse over all keys."""
        ...


class Reference:
    """Plain torch that writes all scores down: an independent check, and the only fp64 ring."""

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        scores, (_, _, wide_v) = self._scores(q, k, v, causal, softmax_scale)
        lse = scores.logsumexp(dim=-1)
        out = (scores - lse.unsqueeze(-1)).exp() @ wide_v
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, causal: bool, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        scores, (wide_q, wide_k, wide_v) = self._scores(q, k, v, causal, softmax_scale)
        wide_dout = dout.to(scores.dtype)
        weights = (scores - lse.unsqueeze(-1)).exp()
        mean = (wide_dout * out).sum(dim=-1, keepdim=True)
        dscores = weights * (wide_dout @ wide_v.mT - mean) * softmax_scale
        dk = _sum_groups(dscores.mT @ wide_q, k.shape[1])
        dv = _sum_groups(weights.mT @ wide_dout, k.shape[1])
        return (dscores @ wide_k).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _scores(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        k, v = _expand_groups(k, q.shape[1]), _expand_groups(v, q.shape[1])
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scores = q @ k.mT * softmax_scale
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores, (q, k, v)


class FlashCpu:
    """torch's flash kernel for CPU: memory linear in length, fewer KV heads than query heads."""

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return _wrong_device(q, "cpu")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=softmax_scale
        )

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, causal: bool, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=softmax_scale
        )


class Flash:
    """torch's FlashAttention-2 for CUDA, bf16 and fp16; fewer KV heads as they are."""

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return _wrong_device(q, "cuda") or _wrong_dtype(q, HALF) or _wrong_head_dim(q, 8, 256)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # the operator is [b, s, h, d]
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale
        )
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, causal: bool, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        # The state of a random generator that nothing reads: there is no dropout.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0,
            causal, state, unused, scale=softmax_scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Cudnn:
    """cuDNN's attention through torch: on Hopper the fastest kernel that torch ships."""

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return _wrong_device(q, "cuda") or _wrong_dtype(q, HALF) or _wrong_head_dim(q, 8, 128)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=softmax_scale
        )
        return out, lse.reshape(q.shape[:3])  # cuDNN's own is [b, h, s, 1]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, causal: bool, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        # torch keeps one cuDNN graph per shape and strides of q, k and v; up to 2.11 the strides
        # of out and dout are not part of that key, so they must follow from q's.
        dout, out = _with_strides_of(q, dout), _with_strides_of(q, out)
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout, so no seed
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous().unsqueeze(-1), unused, unused, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=softmax_scale,
        )  # fmt: skip


class Efficient:
    """torch's memory-efficient attention for CUDA: slower, but it takes fp32."""

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return (
            _wrong_device(q, "cuda")
            or _wrong_dtype(q, (*HALF, torch.float32))
            or _wrong_head_dim(q, 8, 1024)
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        k, v = _expand_groups(k, q.shape[1]), _expand_groups(v, q.shape[1])
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=softmax_scale
        )
        return out, lse[:, :, : q.shape[2]]  # the operator's own is padded to a multiple of 32

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, causal: bool, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        num_kv_heads = k.shape[1]
        k, v = _expand_groups(k, q.shape[1]), _expand_groups(v, q.shape[1])
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout, so no seed
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, padded, unused, unused, 0.0, [True, True, True, False],
            causal, scale=softmax_scale,
        )  # fmt: skip
        return dq, _sum_groups(dk, num_kv_heads), _sum_groups(dv, num_kv_heads)


def choose_kernel(name: str, q: Tensor, k: Tensor) -> Kernel:
    """The kernel called `name`, or for "auto" the fastest that takes `q` and `k`.

    Raises:
        CompatibilityError: it does not take such tensors; the message says why.
        RecipeError: no such kernel.
    """
    names = _fastest_first(q) if name == "auto" else (name,)
    reasons = []
    for candidate in names:
        kernel = lookup(KERNELS, candidate, "kernel")
        reason = kernel.refuse(q, k)
        if reason is None:
            return kernel
        reasons.append(f"{candidate} {reason}")
    choices = ", ".join(KERNELS)
    raise CompatibilityError(
        f"kernel {name!r} cannot compute q {tuple(q.shape)} {q.dtype} on {q.device}: "
        f"{'; '.join(reasons)}. Cast or move q, k and v, or choose one of auto, {choices}"
    )


def _fastest_first(q: Tensor) -> tuple[str, ...]:
    if q.device.type != "cuda":
        return ("flash_cpu",)
    if torch.cuda.get_device_capability(q.device) >= HOPPER:
        return ("cudnn", "flash", "efficient")
    return ("flash", "cudnn", "efficient")


def _wrong_device(q: Tensor, device: str) -> str | None:
    return None if q.device.type == device else f"runs on {device}"


def _wrong_dtype(q: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    return None if q.dtype in dtypes else f"takes {names}"


def _wrong_head_dim(q: Tensor, multiple: int, limit: int) -> str | None:
    head_dim = q.shape[-1]
    if head_dim % multiple == 0 and head_dim <= limit:
        return None
    return f"takes a head_dim that is a multiple of {multiple} and at most {limit}, not {head_dim}"


def _expand_groups(t: Tensor, num_heads: int) -> Tensor:
    """Repeat key or value heads [b, h_kv, s, d] so that each query head has its own."""
    return t if t.shape[1] == num_heads else t.repeat_interleave(num_heads // t.shape[1], dim=1)


def _sum_groups(t: Tensor, num_kv_heads: int) -> Tensor:
    """The adjoint of `_expand_groups`: sum gradients [b, h, s, d] over the heads of a group."""
    return t if t.shape[1] == num_kv_heads else t.unflatten(1, (num_kv_heads, -1)).sum(dim=2)


def _with_strides_of(model: Tensor, t: Tensor) -> Tensor:
    """`t` laid out in memory like `model`, which has its shape; copies only if it must."""
    sizes = zip(model.shape, model.stride(), t.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in sizes):
        return t
    return torch.empty_strided(model.shape, model.stride(), dtype=t.dtype, device=t.device).copy_(t)


KERNELS: dict[str, Kernel] = {
    "reference": Reference(),
    "flash_cpu": FlashCpu(),
    "flash": Flash(),
    "cudnn": Cudnn(),
    "efficient": Efficient(),
}
