#!/usr/bin/env python3
"""Check of the ring what only GPUs of one host can show; exit code 1 if anything is wrong.

    python scripts/check_ring_gpu.py                # 2 GPUs
    python scripts/check_ring_gpu.py --world 4 --kernels flash,fa4

graph   a CUDA graph of the forward and backward pass, replayed with other contents, gives what the
        call itself gives, under every strategy and kernel; how long both take
kernel  what `kernel="auto"` takes for each dtype, head_dim and kind of mask, and how long it looks
dead    a rank is killed, another time stopped: the others end in time and name it

That results are right is `scripts/bench_ring.py --sections accuracy`.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 8
MASKS = {"dense": {}, "window": {"window": 1024}, "packed": {"cu_seqlens": (0, 3000, 8192)}}
GRAPH_STRATEGIES = ("ring", "all-gather", "ulysses")


def tensors(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list:
    """q, k, v and dout of this rank."""
    return [
        torch.randn(1, rows, n, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def both_passes(attention, q, k, v, dout) -> tuple[torch.Tensor, ...]:
    """out, dq, dk, dv."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def capture(attention, inputs: list) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """A graph of both passes and the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and buffers grow before the capture
            both_passes(attention, *inputs)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = both_passes(attention, *inputs)
    return graph, results


def milliseconds(call, count: int = 20) -> float:
    torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def check_graph(strategy: str, kernel: str, mask: str, world: int) -> str:
    """Raises AssertionError where a replay differs from the call by more than rounding."""
    from extend.ring import ring_attention

    rows = 8192 // world

    def attention(q, k, v):
        return ring_attention(q, k, v, kernel=kernel, strategy=strategy, **MASKS[mask])

    inputs = tensors(rows, 32, 8, 128, torch.bfloat16)
    graph, results = capture(attention, inputs)
    for _ in range(3):
        for held, fresh in zip(inputs, tensors(rows, 32, 8, 128, torch.bfloat16), strict=True):
            held.copy_(fresh)
        graph.replay()
        replayed = [t.clone() for t in results]
        called = both_passes(attention, *inputs)
        for name, got, want in zip(("out", "dq", "dk", "dv"), replayed, called, strict=True):
            # Kernels sum dq in an order that changes from call to call: a few units of bf16.
            torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-9, msg=lambda m, n=name:
                                       f"{n}: {m}")  # fmt: skip
    called = milliseconds(lambda: both_passes(attention, *inputs))
    return f"{milliseconds(graph.replay):.2f} ms, {called:.2f} without a graph"


def check_kernel(dtype: torch.dtype, head_dim: int, mask: str, world: int) -> str:
    from extend.ring import RingComm, ring_attention
    from extend.ring.kernels import choose_kernel
    from extend.ring.mask import make_mask

    inputs = tensors(8192 // world, 8, 2, head_dim, dtype)
    start = time.perf_counter()
    both_passes(lambda q, k, v: ring_attention(q, k, v, **MASKS[mask]), *inputs)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    options = {"window": None, "cu_seqlens": None} | MASKS[mask]
    chosen = choose_kernel("auto", *inputs[:2], mask=make_mask(True, seq_len=8192, **options),
                           group=RingComm().ranks)  # fmt: skip
    name = getattr(chosen, "version", None) or type(chosen).__name__
    return f"{name}, after {seconds:.1f} s"


def attempt(what: str, check, *arguments) -> bool:
    """Print how a check ended; False if it failed, after which the process is of no more use."""
    try:
        ending = check(*arguments)
    except Exception:  # of any kind: it is what was looked for
        if dist.get_rank() == 0:
            print(f"FAILED {what}\n{traceback.format_exc()}", flush=True)
        return False
    if dist.get_rank() == 0:
        print(f"ok     {what}: {ending}", flush=True)
    return True


def join(timeout_seconds: float) -> int:
    """The number of ranks."""
    torch.cuda.set_device(int(os.environ["RANK"]))
    dist.init_process_group(
        "nccl", device_id=torch.device("cuda", int(os.environ["RANK"])),
        timeout=timedelta(seconds=timeout_seconds),
    )  # fmt: skip
    return dist.get_world_size()


def rank_graph(strategy: str, kernel: str) -> int:
    """One process for each pair: a capture that fails leaves CUDA unusable."""
    world = join(60)
    what = f"graph {strategy} {kernel}"
    return not all(attempt(f"{what} {mask}", check_graph, strategy, kernel, mask, world)
                   for mask in MASKS)  # fmt: skip


def rank_kernel() -> int:
    world = join(60)
    cases = [(dtype, head_dim, mask) for dtype in (torch.bfloat16, torch.float16, torch.float32)
             for head_dim in (64, 128, 256) for mask in MASKS]  # fmt: skip
    return not all(
        attempt(f"kernel {str(dtype)[6:]} d{head_dim} {mask}", check_kernel, dtype, head_dim, mask,
                world)
        for dtype, head_dim, mask in cases
    )  # fmt: skip


def rank_dead(how: str) -> int:
    """The last rank goes silent in the middle; the others call on and should be ended."""
    from extend.ring import ring_attention

    world = join(TIMEOUT_SECONDS)
    inputs = tensors(2048, 32, 8, 128, torch.bfloat16)
    for turn in range(3000):
        ring_attention(*inputs[:3], kernel="flash", strategy="ring")
        torch.cuda.synchronize()
        if turn == 5 and dist.get_rank() == world - 1:
            os.kill(os.getpid(), getattr(signal, how))
        time.sleep(0.01)
    return 0


def start(world: int, *arguments: str) -> list[subprocess.Popen]:
    """This script on `world` GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", *arguments], text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE if arguments[0] == "dead" else None,
        )
        for rank in range(world)
    ]  # fmt: skip


def run_ranks(world: int, *arguments: str) -> bool:
    codes = [process.wait(timeout=600) for process in start(world, *arguments)]
    return not any(codes)


def run_dead(world: int, how: str) -> bool:
    processes = start(world, "dead", how)
    began, passed = time.monotonic(), True
    for rank, process in enumerate(processes[:-1]):
        try:
            _, said = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
        named = f"for rank {world - 1} to" in said or f"rank {world - 1}" in said
        ended = process.returncode not in (0, -signal.SIGKILL)
        passed = passed and named and ended
        print(f"{'ok    ' if named and ended else 'FAILED'} {how} of rank {world - 1}: rank {rank} "
              f"ended with {process.returncode} after {time.monotonic() - began:.0f} s, start "
              f"included, time-out {TIMEOUT_SECONDS} s{'' if named else '; it did not name it'}",
              flush=True)  # fmt: skip
    processes[-1].kill()
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2, help="GPUs to use")
    parser.add_argument("--kernels", default="cudnn,flash", help="of section graph")
    parser.add_argument("--sections", default="graph,kernel,dead")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        section, *arguments = options.rank
        return {"graph": rank_graph, "kernel": rank_kernel, "dead": rank_dead}[section](*arguments)
    found = []
    if "graph" in options.sections:
        found += [run_ranks(options.world, "graph", strategy, kernel)
                  for strategy in GRAPH_STRATEGIES
                  for kernel in options.kernels.split(",")]  # fmt: skip
    if "kernel" in options.sections:
        found.append(run_ranks(options.world, "kernel"))
    if "dead" in options.sections:
        found += [run_dead(options.world, how) for how in ("SIGKILL", "SIGSTOP")]
    print(f"{sum(found)} of {len(found)} runs are as they should be")
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
