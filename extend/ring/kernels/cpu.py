"""Kernels without a GPU: the written-out reference, and torch's flash attention for CPU."""

import torch
from torch import Tensor

from extend.ring.kernels.base import expand_groups, square, sum_groups, turned, wrong_device
from extend.ring.mask import TileMask

aten = torch.ops.aten


class Reference:
    """Plain torch that writes all scores down: an independent check on any device and dtype."""

    bands = True
    packed = True

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        scores, (_, _, wide_v) = self._scores(q, k, v, mask, softmax_scale)
        lse = scores.logsumexp(dim=-1)
        out = (scores - lse.unsqueeze(-1)).exp() @ wide_v
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, mask: TileMask, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        scores, (wide_q, wide_k, wide_v) = self._scores(q, k, v, mask, softmax_scale)
        wide_dout = dout.to(scores.dtype)
        weights = (scores - lse.unsqueeze(-1)).exp()
        mean = (wide_dout * out).sum(dim=-1, keepdim=True)
        dscores = weights * (wide_dout @ wide_v.mT - mean) * softmax_scale
        dk = sum_groups(dscores.mT @ wide_q, k.shape[1])
        dv = sum_groups(weights.mT @ wide_dout, k.shape[1])
        return (dscores @ wide_k).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _scores(
        self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, softmax_scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        k, v = expand_groups(k, q.shape[1]), expand_groups(v, q.shape[1])
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scores = q @ k.mT * softmax_scale
        hidden = ~_visible(mask, q.shape[2], k.shape[2], q.device)
        return scores.masked_fill(hidden, float("-inf")), (q, k, v)


class FlashCpu:
    """torch's flash kernel for CPU: memory linear in length, fewer KV heads than query heads."""

    bands = False
    packed = False

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return wrong_device(q, "cpu")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        causal, turn = square(mask, q, k)
        q, k, v = turned(turn, q, k, v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=softmax_scale
        )
        out, lse = turned(turn, out, lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, mask: TileMask, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        causal, turn = square(mask, q, k)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *turned(turn, dout, q, k, v, out, lse), 0.0, causal, scale=softmax_scale
        )
        dq, dk, dv = turned(turn, *grads)
        return dq, dk, dv


def _visible(mask: TileMask, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """bool [sq, sk]: which key rows a query row of the tile sees."""
    queries = torch.arange(num_queries, device=device).unsqueeze(1)
    keys = torch.arange(num_keys, device=device).unsqueeze(0)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if mask.lo is not None:
        visible &= queries - keys >= mask.lo
    if mask.hi is not None:
        visible &= queries - keys <= mask.hi
    if mask.cu_seqlens is not None:
        starts = torch.tensor(mask.cu_seqlens[1:-1], device=device, dtype=torch.int64)
        document = [torch.bucketize(rows, starts, right=True) for rows in (queries, keys)]
        visible &= document[0] == document[1]
    return visible
