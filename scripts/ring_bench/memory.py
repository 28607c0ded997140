"""Sections memory and profile: bytes at the fullest moment, and what waits for whom."""

import dataclasses
import gc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ring_bench.contenders import Contender, OneGpu, Ours
from ring_bench.problems import DTYPES, Problem
from ring_bench.session import Session
from ring_bench.timing import Entry, make_call

Interval = tuple[float, float]
TRACED_CALLS = 2


def measure_memory(session: Session, problem: Problem, contender: Ours) -> dict[str, Any]:
    """One row, bytes on the rank that needs most.

    `path`: what a forward and backward call of a new process group adds at its fullest, q, k, v and
    dout included, with what grew outside torch's allocator (symmetric memory, NCCL's connections).
    `local`: q, k, v, out, their gradients and two blocks of keys and values. `workspace`: what the
    kernel alone needs beyond arguments and results for a block of the local length.
    """
    row = {"name": contender.name, "mask": problem.mask, "seq_len": problem.seq_len}
    if not session.is_cuda:
        return {**row, "reason": "needs CUDA: there is no count of bytes on a CPU"}
    dense = dataclasses.replace(problem, window=None, cu_seqlens=None)
    single = OneGpu(contender.kernel, local=True)
    found, reason = session.attempt(lambda: _peak(session, dense, single))
    if reason:
        return {**row, "reason": f"{single.name}: {reason}"}
    rows = problem.seq_len // session.world
    workspace = session.slowest(found - tensor_bytes(problem, rows))
    found, reason = session.attempt(lambda: _path(session, problem, contender))
    if reason:
        return {**row, "reason": reason}
    inside, outside = (session.slowest(value) for value in found)
    path, ideal = inside + outside, tensor_bytes(problem, rows) + 2 * kv_bytes(problem, rows)
    return {
        **row, "path": path, "outside_allocator": outside, "local": ideal, "workspace": workspace,
        "ratio": path / ideal, "ratio_without_workspace": (path - workspace) / ideal,
    }  # fmt: skip


def _path(session: Session, problem: Problem, contender: Ours) -> tuple[int, int]:
    """Bytes inside and outside torch's allocator that a call of a new process group adds."""
    _peak(session, problem, contender)  # compiles, and loads kernels, on the default group
    group = dist.new_group()
    try:
        dist.all_reduce(torch.zeros(1, device=session.device), group=group)  # NCCL's own buffers
        before = Usage.now()
        inside = _peak(session, problem, contender._replace(group=group))
        return inside, max(0, Usage.now().outside - before.outside)
    finally:
        dist.destroy_process_group(group)


class Usage(NamedTuple):
    """Bytes of this GPU in use, by torch's tensors and by all else."""

    allocated: int
    outside: int

    @classmethod
    def now(cls) -> "Usage":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return cls(torch.cuda.memory_allocated(), total - free - torch.cuda.memory_reserved())


def tensor_bytes(problem: Problem, rows: int) -> int:
    """q, k, v, out, their gradients and lse of `rows` tokens."""
    size = DTYPES[problem.dtype].itemsize
    values = 2 * rows * (2 * problem.heads + 2 * problem.kv_heads) * problem.head_dim
    return values * size + rows * problem.heads * 4


def kv_bytes(problem: Problem, rows: int) -> int:
    """One block of keys and values."""
    return 2 * rows * problem.kv_heads * problem.head_dim * DTYPES[problem.dtype].itemsize


def _peak(session: Session, problem: Problem, contender: Contender) -> int:
    """Bytes of tensors at the fullest moment of a forward and backward call, less those before."""
    before = Usage.now().allocated
    tensors = problem.tensors(contender.rows(problem, session), session.device)
    with contender.context():
        entry = Entry(contender, contender.build(problem, session), tensors)
        torch.cuda.reset_peak_memory_stats()
        make_call(entry, "fwd+bwd")()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def profile(
    session: Session, problem: Problem, contender: Contender, folder: Path
) -> dict[str, Any]:
    """Trace forward and backward calls; writes a Chrome trace of the first rank."""
    row: dict[str, Any] = {"name": contender.name, "mask": problem.mask, "seq_len": problem.seq_len}
    if not session.is_cuda:
        return {**row, "reason": "needs CUDA: no kernels to trace on a CPU"}
    events, reason = session.attempt(lambda: _trace(session, problem, contender, folder))
    return {**row, "reason": reason} if reason else {**row, **exposed(events)}


def _trace(
    session: Session, problem: Problem, contender: Contender, folder: Path
) -> list["Event"]:
    from torch.profiler import ProfilerActivity

    tensors = problem.tensors(contender.rows(problem, session), session.device)
    with contender.context():
        entry = Entry(contender, contender.build(problem, session), tensors)
        call = make_call(entry, "fwd+bwd")
        session.time_calls(call, 2)
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as trace:
            for _ in range(TRACED_CALLS):
                call()
            session.synchronize()
    if session.rank == 0:
        name = "".join(c if c.isalnum() else "_" for c in contender.name)
        folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(folder / f"{name}_{problem.seq_len}.json"))
    cuda = torch.autograd.DeviceType.CUDA
    return [
        Event(event.name, event.device_resource_id, event.time_range.start, event.time_range.end)
        for event in trace.events() if event.device_type == cuda
    ]  # fmt: skip


class Event(NamedTuple):
    """A kernel or copy on the GPU; microseconds."""

    name: str
    stream: int
    start: float
    end: float


def exposed(events: Sequence[Event]) -> dict[str, float]:
    """Milliseconds of one rank's traced calls: computing, moving data, only moving data, idle.

    A transfer is an NCCL kernel, a copy between GPUs, a wait of symmetric memory, or any copy on
    another stream than the busiest.
    """
    streams: dict[int, float] = {}
    for event in events:
        streams[event.stream] = streams.get(event.stream, 0.0) + event.end - event.start
    main = max(streams, key=streams.get, default=None)
    moving, computing = [], []
    for event in events:
        lowered = event.name.lower()
        is_transfer = any(word in lowered for word in ("nccl", "ptop", "symm"))
        is_transfer |= "memcpy" in lowered and event.stream != main
        (moving if is_transfer else computing).append((event.start, event.end))
    busy = union(computing)
    everything = union(computing + moving)
    span = max((b for _, b in everything), default=0) - min((a for a, _ in everything), default=0)
    return {
        "compute_ms": length(busy) / 1e3, "transfer_ms": length(union(moving)) / 1e3,
        "exposed_ms": (length(everything) - length(busy)) / 1e3,
        "idle_ms": (span - length(everything)) / 1e3, "span_ms": span / 1e3,
    }  # fmt: skip


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals that do not touch, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
