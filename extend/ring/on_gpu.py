"""What the ring does between kernel calls, for GPUs: each in one pass over memory, any strides.

Tensors are [b, h, s, d] with a contiguous last dimension; often they are slices of heads or rows,
for which torch's elementwise kernels are half as fast.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # rows a program handles; 32 x 128 values are a few registers a thread


@triton.jit
def _offsets(stride_b, stride_h, stride_s, num_heads, row):
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    return batch * stride_b + head * stride_h + row * stride_s


@triton.jit
def _merge_kernel(
    out, lse, block_out, block_lse, num_heads, num_rows, head_dim,
    out_b, out_h, out_s, lse_b, lse_h, lse_s, blk_b, blk_h, blk_s, bls_b, bls_h, bls_s,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    there = row < num_rows
    cells = there[:, None] & (column < head_dim)
    lse_at = lse + _offsets(lse_b, lse_h, lse_s, num_heads, row)
    ours = tl.load(lse_at, mask=there, other=0.0)
    bls_at = block_lse + _offsets(bls_b, bls_h, bls_s, num_heads, row)
    theirs = tl.load(bls_at, mask=there, other=0.0)
    weight = 1.0 / (1.0 + tl.exp(ours - theirs))
    out_at = out + _offsets(out_b, out_h, out_s, num_heads, row)[:, None] + column
    blk_at = block_out + _offsets(blk_b, blk_h, blk_s, num_heads, row)[:, None] + column
    old = tl.load(out_at, mask=cells, other=0.0).to(tl.float32)
    new = tl.load(blk_at, mask=cells, other=0.0).to(tl.float32)
    joined = old + weight[:, None] * (new - old)
    tl.store(out_at, joined.to(out.dtype.element_ty), mask=cells)
    largest = tl.maximum(ours, theirs)
    total = largest + tl.log(tl.exp(ours - largest) + tl.exp(theirs - largest))
    tl.store(lse_at, total, mask=there)


@triton.jit
def _sum_kernel(
    out, a, b, num_heads, num_rows, head_dim,
    out_b, out_h, out_s, a_b, a_h, a_s, b_b, b_h, b_s,
    TWO: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    cells = (row < num_rows)[:, None] & (column < head_dim)
    a_at = a + _offsets(a_b, a_h, a_s, num_heads, row)[:, None] + column
    total = tl.load(a_at, mask=cells, other=0.0).to(tl.float32)
    if TWO:
        b_at = b + _offsets(b_b, b_h, b_s, num_heads, row)[:, None] + column
        total += tl.load(b_at, mask=cells, other=0.0).to(tl.float32)
    out_at = out + _offsets(out_b, out_h, out_s, num_heads, row)[:, None] + column
    tl.store(out_at, total.to(out.dtype.element_ty), mask=cells)


def merge_on_gpu(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add attention over more keys to `out` [b, h, s, d] and `lse` fp32 [b, h, s], in place."""
    _, num_heads, num_rows, head_dim = out.shape
    with torch.cuda.device(out.device):
        _merge_kernel[_grid(out)](
            out, lse, block_out, block_lse, num_heads, num_rows, head_dim,
            *out.stride()[:3], *lse.stride(), *block_out.stride()[:3], *block_lse.stride(),
            ROWS=_ROWS, WIDTH=triton.next_power_of_2(head_dim),
        )  # fmt: skip


def sum_on_gpu(out: Tensor, a: Tensor, b: Tensor | None) -> None:
    """Write a + b, or a alone, to `out`, which may be one of them; sums are fp32."""
    _, num_heads, num_rows, head_dim = out.shape
    second = a if b is None else b
    with torch.cuda.device(out.device):
        _sum_kernel[_grid(out)](
            out, a, second, num_heads, num_rows, head_dim,
            *out.stride()[:3], *a.stride()[:3], *second.stride()[:3],
            TWO=b is not None, ROWS=_ROWS, WIDTH=triton.next_power_of_2(head_dim),
        )  # fmt: skip


def _grid(out: Tensor) -> tuple[int, int]:
    return triton.cdiv(out.shape[2], _ROWS), out.shape[0] * out.shape[1]
