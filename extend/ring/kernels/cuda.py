"""cuDNN's and the memory-efficient attention of torch, for CUDA: rectangles and squares."""

import torch
from torch import Tensor

from extend.ring.kernels.base import (
    HALF,
    expand_groups,
    square,
    sum_groups,
    turned,
    wrong_device,
    wrong_dtype,
    wrong_head_dim,
)
from extend.ring.kernels.cpu import Reference
from extend.ring.mask import FULL, TileMask

aten = torch.ops.aten

_ONE_KEY = Reference()


class Cudnn:
    """cuDNN's attention through torch, bf16 and fp16; compiles a graph for each new shape.

    torch's variable-length form of it runs at a quarter of the dense form's speed, and compiles a
    graph for each set of lengths, so documents are computed one by one.

    Source: the limits are those of `check_cudnn_tensor_shapes` in torch's
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp. Releases after 2.13 go up to head_dim 256
    with a newer cuDNN; this class stays with what every torch that it runs on takes.
    """

    bands = False
    packed = False

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return wrong_device(q, "cuda") or wrong_dtype(q, HALF) or wrong_head_dim(q, 8, 128)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        causal, turn = square(mask, q, k)
        if k.shape[2] == 1:  # cuDNN has no attention to one key; of all masks it leaves FULL
            return _ONE_KEY.forward(q, k, v, mask=FULL, softmax_scale=softmax_scale)
        q, k, v = turned(turn, q, k, v)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=softmax_scale
        )
        out, lse = turned(turn, out, lse.reshape(q.shape[:3]))  # cuDNN's own is [b, h, s, 1]
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, mask: TileMask, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        causal, turn = square(mask, q, k)
        if k.shape[2] == 1:
            options = {"mask": FULL, "softmax_scale": softmax_scale}
            return _ONE_KEY.backward(dout, q, k, v, out, lse, **options)
        dout, q, k, v, out, lse = turned(turn, dout, q, k, v, out, lse)
        # torch keeps one cuDNN graph per shape and strides of q, k and v; up to 2.11 the strides
        # of out and dout are not part of that key, so they must follow from q's.
        dout, out = _with_strides_of(q, dout), _with_strides_of(q, out)
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout, so no seed
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous().unsqueeze(-1), unused, unused, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=softmax_scale,
        )  # fmt: skip
        dq, dk, dv = turned(turn, *grads)
        return dq, dk, dv


class Efficient:
    """torch's memory-efficient attention for CUDA: slower, but it takes fp32 and any head_dim.

    Source: the alignment is that of `minimum_gemm_alignment` in torch's
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """

    bands = False
    packed = False

    def refuse(self, q: Tensor, k: Tensor) -> str | None:
        return (
            wrong_device(q, "cuda")
            or wrong_dtype(q, (*HALF, torch.float32))
            or wrong_head_dim(q, 8 if q.dtype in HALF else 4)
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        causal, turn = square(mask, q, k)
        q, k, v = turned(turn, q, k, v)
        k, v = expand_groups(k, q.shape[1]), expand_groups(v, q.shape[1])
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=softmax_scale
        )
        # the operator's own lse is padded to a multiple of 32 rows
        out, lse = turned(turn, out, lse[:, :, : q.shape[2]])
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *, mask: TileMask, softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        num_kv_heads = k.shape[1]
        causal, turn = square(mask, q, k)
        dout, q, k, v, out, lse = turned(turn, dout, q, k, v, out, lse)
        k, v = expand_groups(k, q.shape[1]), expand_groups(v, q.shape[1])
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout, so no seed
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, padded, unused, unused, 0.0, [True, True, True, False],
            causal, scale=softmax_scale,
        )  # fmt: skip
        dk, dv = sum_groups(dk, num_kv_heads), sum_groups(dv, num_kv_heads)
        dq, dk, dv = turned(turn, dq, dk, dv)
        return dq, dk, dv


def _with_strides_of(model: Tensor, t: Tensor) -> Tensor:
    """`t` laid out in memory like `model`, which has its shape; copies only if it must."""
    sizes = zip(model.shape, model.stride(), t.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in sizes):
        return t
    return torch.empty_strided(model.shape, model.stride(), dtype=t.dtype, device=t.device).copy_(t)
