"""Check and time the ring's CUDA kernels on this machine.

    python scripts/check_ring_gpu.py                                   # kernels, on one GPU
    torchrun --nproc_per_node 2 scripts/check_ring_gpu.py              # and the ring over two

Accuracy: out, dq, dk and dv of every kernel and of the ring, whole tensors, against fp64. A kernel
may be 2.5 times as wrong as one call of torch's flash attention, plus 2e-3. Time: the ring on N
GPUs against the same kernel on one; efficiency is (time on one / N) / time of the ring. Times are
medians, of the slowest rank. Exit code 1 if anything fails.
"""

import argparse
import math
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from extend.errors import ExtendError
from extend.ring import LAYOUTS, RingComm, ring_attention, shard, unshard
from extend.ring.attention import attend
from extend.ring.kernels import KERNELS

NAMES = ("out", "dq", "dk", "dv")
HEADS = ((9, 3), (32, 8))
HEAD_DIMS = (64, 128)
# Blocks as zigzag and striped cut them from a sequence of 512: (queries, keys, causal).
HALF, ALL = 256, slice(None)
BLOCKS = {
    "square causal": (ALL, ALL, True),
    "square full": (ALL, ALL, False),
    "all x head": (ALL, slice(0, HALF), False),
    "tail x all": (slice(HALF, None), ALL, False),
    "shifted causal": (slice(1, None), slice(0, -1), True),
}


def make_inputs(seq_len, num_heads, num_kv_heads, head_dim, dtype, device):
    """q, k, v, dout [1, h, s, d], in memory [1, s, h, d] as models have them; same on all ranks."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, seq_len, heads, head_dim, generator=generator, device=device)
        .to(dtype).transpose(1, 2)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]  # fmt: skip


def exact(q, k, v, dout, causal):
    """out, dq, dk, dv in fp64, from the definition and autograd."""
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT / q.shape[-1] ** 0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())


def one_flash_call(q, k, v, dout, causal):
    """out, dq, dk, dv of torch's own attention, on its flash kernel (fp32: memory-efficient)."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    wide, backend = leaves, SDPBackend.FLASH_ATTENTION
    if q.dtype == torch.float32:  # a kernel that wants as many KV heads as query heads
        group = q.shape[1] // k.shape[1]
        wide = [leaves[0], *(t.repeat_interleave(group, 1) for t in leaves[1:])]
        backend = SDPBackend.EFFICIENT_ATTENTION
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=wide is leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def compare(results, expected, baseline):
    """(worst error as a fraction of what is allowed, its name and size) over out, dq, dk, dv."""
    worst = (0.0, "", 0.0)
    for name, got, want, flash in zip(NAMES, results, expected, baseline, strict=True):
        error = (got.double() - want).abs().max().item()
        allowed = 2.5 * (flash.double() - want).abs().max().item() + 2e-3
        used = error / allowed if error == error else float("inf")
        worst = max(worst, (used, name, error))
    return worst


def check_kernel(name, dtype, device):
    """One row per head layout and head_dim: the worst over all blocks."""
    rows, kernel = [], KERNELS[name]
    for (num_heads, num_kv_heads), head_dim in ((h, d) for h in HEADS for d in HEAD_DIMS):
        worst = (0.0, "", 0.0, "")
        for label, (queries, keys, causal) in BLOCKS.items():
            q, k, v, dout = make_inputs(512, num_heads, num_kv_heads, head_dim, dtype, device)
            q, dout = q[:, :, queries], dout[:, :, queries]
            k, v = k[:, :, keys], v[:, :, keys]
            options = {"causal": causal, "softmax_scale": head_dim**-0.5}
            out, lse = kernel.forward(q, k, v, **options)
            results = out, *kernel.backward(dout, q, k, v, out, lse, **options)
            used, what, error = compare(
                results, exact(q, k, v, dout, causal), one_flash_call(q, k, v, dout, causal)
            )
            worst = max(worst, (used, what, error, label))
        case = f"{name} {str(dtype)[6:]} {num_heads}:{num_kv_heads} d{head_dim}"
        rows.append((case, worst[0], f"{worst[1]} {worst[2]:.1e} in {worst[3]}"))
    return rows


def check_ring(kernel, layout, causal, rank, world, device):
    """The row of the ring over all GPUs on a sequence of 256 tokens a rank, gathered whole."""
    inputs = make_inputs(256 * world, 32, 8, 128, torch.bfloat16, device)
    q, k, v, dout = (shard(t, 2, layout, rank, world) for t in inputs)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = ring_attention(q, k, v, layout=layout, kernel=kernel, causal=causal)
    out.backward(dout)
    results = [gather(t, layout, world) for t in (out.detach(), q.grad, k.grad, v.grad)]
    used, what, error = compare(results, exact(*inputs, causal), one_flash_call(*inputs, causal))
    case = f"ring {kernel} {layout} {'causal' if causal else 'full'} x{world}"
    return [(case, used, f"{what} {error:.1e}")]


def gather(t, layout, world):
    if world == 1:
        return t
    parts = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for _ in range(world)]
    dist.all_gather(parts, t.contiguous())
    return unshard(parts, 2, layout)


def time_call(comm, kernel, seq_len, device):
    """Milliseconds (fwd, fwd+bwd) of `seq_len` tokens over the ranks of `comm`, zigzag, causal."""
    q, k, v, dout = make_inputs(seq_len // comm.world, 32, 8, 128, torch.bfloat16, device)
    q, k, v = (t.requires_grad_() for t in (q, k, v))

    def forward():
        return attend(
            q, k, v, comm=comm, layout="zigzag", causal=True, softmax_scale=None, kernel=kernel
        )

    def both():
        torch.autograd.grad(forward(), (q, k, v), dout)

    with torch.no_grad():
        fwd = median_ms(forward, device)
    return fwd, median_ms(both, device)


def median_ms(call, device, budget_ms=400.0):
    """The median of as many runs as fit in `budget_ms`, 3 to 20; of the slowest rank."""
    call()  # builds plans and connections
    runs = max(3, min(20, int(budget_ms / slowest(timed(call), device))))
    return slowest(statistics.median(timed(call) for _ in range(runs)), device)


def timed(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def slowest(milliseconds, device):
    t = torch.tensor(milliseconds, device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def accuracy_rows(rank, world, device):
    """(case, used fraction of the allowed error, what was worst) of all checks."""
    checks = [
        (check_kernel, "flash", torch.bfloat16),
        (check_kernel, "cudnn", torch.bfloat16),
        (check_kernel, "efficient", torch.bfloat16),
        (check_kernel, "efficient", torch.float32),
    ]
    for kernel in ("flash", "cudnn"):
        checks += [(check_ring, kernel, layout, True, rank, world) for layout in LAYOUTS]
        checks.append((check_ring, kernel, "zigzag", False, rank, world))
    rows = []
    for check, *args in checks:
        try:
            rows += check(*args, device)
        except (ExtendError, RuntimeError, TypeError) as error:
            case = f"{check.__name__} {' '.join(map(str, args))}"
            rows.append((case, math.inf, f"{type(error).__name__}: {str(error)[:300]}"))
    return rows


def timing_rows(kernels, lengths, device):
    """Table lines: the kernel on one GPU, the ring on all, and the efficiency."""
    rows, world = [], dist.get_world_size()
    for kernel in kernels:
        for seq_len in lengths:
            single = time_call(RingComm.alone(), kernel, seq_len, device)
            ring = time_call(RingComm(), kernel, seq_len, device) if world > 1 else single
            efficiency = [s / world / r for s, r in zip(single, ring, strict=True)]
            # causal: half of 4 s^2 h d operations forward, 3.5 times as many with backward
            tera = [2e-9 * seq_len**2 * 32 * 128 * f / ms for f, ms in zip((1, 3.5), single)]
            rows.append(
                f"{kernel:6} {seq_len:7}   {single[0]:8.2f} {single[1]:8.2f}"
                f"   ({tera[0]:3.0f} {tera[1]:3.0f})   {ring[0]:8.2f} {ring[1]:8.2f}"
                f"   {efficiency[0]:.3f} {efficiency[1]:.3f}"
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="16384,32768,65536,131072")
    parser.add_argument("--kernels", default="cudnn,flash", help="which kernels to time")
    options = parser.parse_args()
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": 29511}  # fmt: skip
    for variable, value in alone.items():  # without torchrun
        os.environ.setdefault(variable, str(value))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    accuracy = accuracy_rows(rank, world, device)
    lengths = [int(length) for length in options.lengths.split(",")]
    timing = timing_rows(options.kernels.split(","), lengths, device)
    failed = sum(row[1] > 1 for row in accuracy)
    if rank == 0:
        report(accuracy, timing, failed, world)
    dist.destroy_process_group()
    sys.exit(1 if failed else 0)


def report(accuracy, timing, failed, world):
    print(f"\ntorch {torch.__version__}, {world} x {torch.cuda.get_device_name()}")
    print("error as a fraction of what is allowed; the worst of out, dq, dk, dv")
    for case, used, worst in accuracy:
        print(f"  {'FAILED' if used > 1 else 'ok':6} {case:32} {used:5.2f}   {worst}")
    print(f"32:8 heads, d128, bf16, causal, zigzag on {world}: ms fwd and fwd+bwd")
    print("kernel  length      one GPU   (TFLOP/s)        ring on all     efficiency")
    for row in timing:
        print(row)
    print(f"{failed} checks failed" if failed else f"all {len(accuracy)} checks passed")


if __name__ == "__main__":
    main()
