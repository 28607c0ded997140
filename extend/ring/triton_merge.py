"""`lse.merge_partial` for GPUs, in one pass over memory: one read and one write of `out`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # query rows a program joins; 32 x 128 values are a few registers a thread


@triton.jit
def _merge_kernel(
    out, lse, block_out, block_lse, num_heads, num_rows, head_dim,
    out_b, out_h, out_s, lse_b, lse_h, lse_s, blk_b, blk_h, blk_s, bls_b, bls_h, bls_s,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there = row < num_rows
    cells = there[:, None] & (column < head_dim)[None, :]
    lse_at = lse + batch * lse_b + head * lse_h + row * lse_s
    ours = tl.load(lse_at, mask=there, other=0.0)
    theirs = tl.load(block_lse + batch * bls_b + head * bls_h + row * bls_s, mask=there, other=0.0)
    weight = 1.0 / (1.0 + tl.exp(ours - theirs))
    out_at = out + batch * out_b + head * out_h + row[:, None] * out_s + column[None, :]
    blk_at = block_out + batch * blk_b + head * blk_h + row[:, None] * blk_s + column[None, :]
    old = tl.load(out_at, mask=cells, other=0.0).to(tl.float32)
    new = tl.load(blk_at, mask=cells, other=0.0).to(tl.float32)
    joined = old + weight[:, None] * (new - old)
    tl.store(out_at, joined.to(out.dtype.element_ty), mask=cells)
    largest = tl.maximum(ours, theirs)
    total = largest + tl.log(tl.exp(ours - largest) + tl.exp(theirs - largest))
    tl.store(lse_at, total, mask=there)


def merge_on_gpu(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add attention over more keys to `out` [b, h, s, d] and `lse` fp32 [b, h, s], in place.

    The last dimension of `out` and `block_out` is contiguous; the others have any strides.
    """
    batch, num_heads, num_rows, head_dim = out.shape
    grid = (triton.cdiv(num_rows, _ROWS), batch * num_heads)
    with torch.cuda.device(out.device):
        _merge_kernel[grid](
            out, lse, block_out, block_lse, num_heads, num_rows, head_dim,
            *out.stride()[:3], *lse.stride(), *block_out.stride()[:3], *block_lse.stride(),
            ROWS=_ROWS, WIDTH=triton.next_power_of_2(head_dim),
        )  # fmt: skip
