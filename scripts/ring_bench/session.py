"""The processes of one run: what they agree on, and how much time is left."""

import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Session:
    """This process among all: rank, world and device, and the run's clock."""

    def __init__(self, device: str, budget_seconds: float):
        """Join the others, as torchrun started them, or run alone."""
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": 0}  # fmt: skip
        for variable, value in alone.items():
            os.environ.setdefault(variable, str(value))
        self.is_cuda = device == "cuda"
        self.device = torch.device(device, int(os.environ["LOCAL_RANK"]) if self.is_cuda else None)
        options: dict[str, Any] = {"timeout": timedelta(seconds=180)}
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            options["device_id"] = self.device
        dist.init_process_group("nccl" if self.is_cuda else "gloo", **options)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._end = time.monotonic() + budget_seconds

    def close(self) -> None:
        dist.barrier()  # nobody leaves while another may still talk to it
        dist.destroy_process_group()

    def say(self, *words: object) -> None:
        """Print on the first rank."""
        if self.rank == 0:
            print(*words, flush=True)

    def left(self) -> float:
        """Seconds of the budget that are left, the same number on every rank."""
        left = torch.tensor(self._end - time.monotonic(), device=self.device)
        dist.broadcast(left, 0)
        return left.item()

    def slowest(self, value: float) -> float:
        """The largest `value` of any rank."""
        largest = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def attempt(self, work: Callable[[], Any]) -> tuple[Any, str | None]:
        """(what `work` returned, None), or (None, why it failed on some rank), alike on all ranks.

        Only a failure of all ranks, or one outside communication, can be caught: a rank that
        leaves the others waiting ends the run with a time-out.
        """
        result, reason = None, None
        try:
            result = work()
            self.synchronize()
        except Exception as error:  # whatever it is, the others are still to be measured
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        reasons: list[str | None] = [None] * self.world
        dist.all_gather_object(reasons, reason)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text]
        if not failed:
            return result, None
        if self.is_cuda:
            torch.cuda.empty_cache()
        return None, failed[0] if len(failed) < self.world else reasons[0]

    def time_calls(self, call: Callable[[], Any], count: int, warm: bool = True) -> float:
        """Milliseconds of one call: the median of `count`, of the slowest rank; first one to warm.

        The calls follow each other without a pause, as layers of a model do, so that the process
        that launches kernels may run ahead. On a CPU, where times mean nothing, once is enough.
        """
        self.synchronize()
        dist.barrier()
        if warm:
            call()
        times = _cuda_times(call, count) if self.is_cuda else _cpu_times(call, 1)
        return self.slowest(statistics.median(times))


def _cuda_times(call: Callable[[], Any], count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _cpu_times(call: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times
