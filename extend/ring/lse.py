"""Join partial results: attention through its log-sum-exp, gradients by adding them up.

Shapes: b batch, h query heads, s queries, d head_dim. `lse` [b, h, s] is the natural logarithm of
the sum of exp(scaled scores), at least fp32; it says how much softmax mass a partial result holds.
"""

import torch
from torch import Tensor


def merge_partial(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add attention over more keys to `out` [b, h, s, d] and `lse` [b, h, s], both in place.

    Each partial result is already divided by its own softmax sum, so the union of two key sets is
    the mean of the two, weighted by exp(lse). The block's weight is sigmoid(block_lse - lse),
    which never overflows; a block without a key (block_lse = -inf) has weight 0, and so have rows
    of `out` that hold nothing yet (lse = -inf). A query with no key on either side would give NaN;
    no layout has one. The arithmetic is fp32 or better and rounds to the dtype of `out` once.

    Source: Milakov and Gimelshein, arXiv:1805.02867, section 3.
    """
    if out.is_cuda and out.dtype != torch.float64:
        # Imported here: Triton comes with CUDA builds of torch only.
        from extend.ring.on_gpu import merge_on_gpu

        merge_on_gpu(out, lse, block_out, block_lse)
        return
    wide = torch.promote_types(out.dtype, torch.float32)
    weight = torch.sigmoid(block_lse - lse).unsqueeze(-1).to(wide)
    if out.dtype == wide:
        out.lerp_(block_out.to(wide), weight)
    else:
        out.copy_(torch.lerp(out.to(wide), block_out.to(wide), weight))
    lse.copy_(torch.logaddexp(lse, block_lse))


def write_sum(out: Tensor, a: Tensor, b: Tensor | None = None) -> None:
    """Write a + b, or a alone, to `out`, all [b, h, s, d]; `out` may be one of them.

    Sums of half precision are taken in fp32 and rounded once.
    """
    if out.is_cuda and out.dtype != torch.float64 and out.numel():
        from extend.ring.on_gpu import sum_on_gpu

        sum_on_gpu(out, a, b)
    elif b is None:
        out.copy_(a)
    else:
        torch.add(a, b, out=out) if a.dtype == b.dtype == out.dtype else out.copy_(a + b)
