"""Join partial attention results through their log-sum-exp.

Shapes: b batch, h query heads, s queries, d head_dim. `lse` [b, h, s] is the natural logarithm of
the sum of exp(scaled scores), at least fp32; it says how much softmax mass a partial result holds.
"""

import torch
from torch import Tensor


def merge_partial(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add attention over more keys to `out` [b, h, s, d] and `lse` [b, h, s], both in place.

    Each partial result is already divided by its own softmax sum, so the union of two key sets is
    the mean of the two, weighted by exp(lse). The block's weight is sigmoid(block_lse - lse),
    which never overflows; a block without a key (block_lse = -inf) has weight 0. A query with no
    key on either side would give NaN; no layout has one.

    Source: Milakov and Gimelshein, arXiv:1805.02867, section 3.
    """
    weight = torch.sigmoid(block_lse - lse).unsqueeze(-1)
    out.lerp_(block_out.to(out.dtype), weight.to(out.dtype))
    torch.logaddexp(lse, block_lse, out=lse)
