"""How long a kernel takes for a representative piece of a sequence, forward and backward."""

import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from extend.ring.kernels.base import Kernel
from extend.ring.mask import Mask
from extend.ring.tiles import Run, Tile, fit_tiles, plan_tiles

ROWS = 4096
QUERY_HEADS = 32
WARM_UPS, RUNS = 2, 5


def time_kernel(kernel: Kernel, q: Tensor, k: Tensor, mask: Mask) -> float:
    """Milliseconds of `kernel` on its tiles of 4096 tokens (8192 for a window of 4096 or more).

    The tensors are new ones like `q` [b, h, s, d] and `k` [b, h_kv, s, d] in dtype, device,
    head_dim and query heads per key head, laid out as the ring lays them out, so that the answer
    holds for every call with the same signature. The least of five runs.
    """
    sample, seq_len = sample_mask(mask)
    whole = (Run(0, 1, seq_len),)
    # What a mask does not need is not asked: to find out may take a while. Without bands, a
    # window is cut into squares, which a kernel may take side by side.
    bands = sample.window is None or kernel.bands
    packed = (bands and sample.cu_seqlens is None) or kernel.packed
    tiles = fit_tiles(plan_tiles(whole, whole, sample), bands=bands, packed=packed)
    tensors = _sample_tensors(q, q.shape[1] // k.shape[1], seq_len)
    with torch.no_grad():
        times = [
            _milliseconds(lambda: _attend(kernel, tiles, *tensors), q.device)
            for _ in range(WARM_UPS + RUNS)
        ]
    return min(times[WARM_UPS:])


def sample_mask(mask: Mask) -> tuple[Mask, int]:
    """A mask of the same kind for a short sequence, and that sequence's length.

    Documents become four of uneven length; a window longer than 4096 becomes 4096.
    """
    window = None if mask.window is None else min(mask.window, ROWS)
    seq_len = ROWS if window is None else max(ROWS, 2 * window)
    if mask.cu_seqlens is None:
        return Mask(mask.causal, window), seq_len
    parts = [int(seq_len * part) for part in (0.41, 0.08, 0.36)]
    return Mask(mask.causal, window, (0, *accumulate(parts), seq_len)), seq_len


def _sample_tensors(q: Tensor, group: int, seq_len: int) -> tuple[Tensor, ...]:
    """q, k, v and dout: [1, h, s, d], keys and values side by side in one buffer."""
    num_kv_heads = max(1, QUERY_HEADS // group)
    generator = torch.Generator(q.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=q.dtype, device=q.device)

    queries, dout = (
        normal(1, seq_len, num_kv_heads * group, q.shape[-1]).transpose(1, 2) for _ in range(2)
    )
    keys, values = normal(seq_len, 2, 1, num_kv_heads, q.shape[-1]).permute(1, 2, 3, 0, 4)
    return queries, keys, values, dout


def _attend(
    kernel: Kernel, tiles: tuple[Tile, ...], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> None:
    for tile in tiles:
        rows = q[:, :, tile.q], k[:, :, tile.kv], v[:, :, tile.kv]
        options = {"mask": tile.mask, "softmax_scale": q.shape[-1] ** -0.5}
        out, lse = kernel.forward(*rows, **options)
        kernel.backward(dout[:, :, tile.q], *rows, out, lse, **options)


def _milliseconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end)
