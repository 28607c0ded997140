"""Heads that a backward pass takes at a time, so that what it works in stays small.

Kernels sum dq in fp32, in memory that is there only while they run: at 1M tokens and 32 heads of
128 channels 16 GiB, more than any tensor that a layer keeps. Heads do not meet in attention, so
taking some after others changes no bit and, on rows this long, no time.
"""

MOST_SUM_BYTES = 2**31
"""Of the fp32 sum of dq at once: that of 128K tokens, 32 heads and 128 channels."""
_FP32 = 4


def num_head_groups(num_kv_heads: int, q_values: float) -> int:
    """The fewest equal groups of key heads (with their query heads) whose sums are small enough.

    Args:
        q_values: of all queries: batch * query heads * rows * head_dim.
    """
    wanted = q_values * _FP32 / MOST_SUM_BYTES
    return next((n for n in range(1, num_kv_heads) if num_kv_heads % n == 0 and n >= wanted),
                num_kv_heads)
