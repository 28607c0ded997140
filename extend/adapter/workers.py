"""Matrices through devices: read ahead by threads, worked on by one thread a device, in order."""

import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from extend.errors import RecipeError

Item, Read, Result = TypeVar("Item"), TypeVar("Read"), TypeVar("Result")
_AHEAD = {"cpu": 1, "cuda": 2}  # items a worker: the CPU computes for longer than it reads
_ON_A_GPU = 2  # workers: one prepares the next matrix while the GPU works for the other
_HOST_THREADS = 2  # of a worker of a GPU, for eigenvalues of small matrices
_SCRATCH_BYTES = 2**31  # of all workers of a CPU together
_ELEMENT_BYTES = 20  # of a matrix: both models' in 16 bits, twice, in fp32, and what it becomes
_MOST_READERS = 16


def pick_devices(device: str) -> list[str]:
    """The devices that `device` asks for: `auto` for every CUDA device that torch sees.

    Args:
        device: auto, cpu, cuda, or a list such as `cuda:0,cuda:1`.

    Raises:
        RecipeError: another name, or CUDA where torch sees no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return [f"cuda:{i}" for i in range(count)] or ["cpu"]
    names = [name.strip() for name in device.split(",")]
    for name in names:
        kind, _, number = name.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
            raise RecipeError(f"device: unknown {name!r}; choose one of auto, cpu, cuda, or a list "
                              "such as cuda:0,cuda:1")
        if kind == "cuda" and int(number or 0) >= count:
            raise RecipeError(f"device is {name!r} but torch sees {count or 'no'} CUDA device"
                              f"{'s' if count > 1 else ''}; choose cpu or auto")
    return names


def spread(devices: list[str], elements: int) -> tuple[list[str], int]:
    """The devices, each as often as it is best worked on by a thread of its own, and the threads.

    Small matrices gain little from several threads at one of them, so a CPU gets a worker for each
    of torch's threads, as far as memory stays bounded, and the workers share all threads. How many
    threads work on one matrix decides the last bits of what comes out, so that follows from the
    matrices and the CPU, not from how many workers are asked for.

    Args:
        devices: of one kind. One that is named several times stays as it is.
        elements: of the largest matrix.

    Returns:
        The devices, and how many of torch's threads each worker gets on the CPU.
    """
    threads = torch.get_num_threads()
    fitting = max(1, min(threads, _SCRATCH_BYTES // (_ELEMENT_BYTES * max(1, elements))))
    on_gpu = torch.device(devices[0]).type == "cuda"
    if len(set(devices)) == len(devices):
        devices = devices * (_ON_A_GPU if on_gpu else fitting)
    return devices, min(_HOST_THREADS, threads) if on_gpu else threads // fitting


class Workers:
    """Threads that work on devices, and threads that read for them. A context manager.

    Which device takes an item is decided by which is free, so work must not depend on it.

    Args:
        devices: torch names.
        threads: that each may compute with on the CPU; see `spread`.

    Attributes:
        pinned: whether what is read goes on to a GPU, and should lie in pinned memory.
    """

    def __init__(self, devices: list[str], threads: int):
        kind = torch.device(devices[0]).type
        self.pinned = kind == "cuda"
        self._devices: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self._devices.put(device)
        self._window = (1 + _AHEAD[kind]) * len(devices)
        self._threads = torch.get_num_threads()
        if kind == "cuda":
            _load_linear_algebra(devices)
        self._readers = ThreadPoolExecutor(
            min(self._window, _MOST_READERS, 2 * (os.cpu_count() or 1)), "read")
        # A new thread would take all cores for itself, whatever the calling thread was told.
        self._workers = ThreadPoolExecutor(len(devices), "work", torch.set_num_threads, (threads,))

    def run(self, items: Iterable[Item], read: Callable[[Item], Read],
            work: Callable[[Item, Read, str], Result]) -> Iterator[Result]:
        """Yield `work(item, read(item), device)` in the order of the items.

        As many items as there are devices, and a few more, are held in memory at a time.
        """
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                reading = self._readers.submit(read, item)
                pending.append(self._workers.submit(self._work, item, reading, work))
                del reading
                if len(pending) >= self._window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _work(self, item: Item, reading: "Future[Read]",
              work: Callable[[Item, Read, str], Result]) -> Result:
        device = self._devices.get()
        try:
            return work(item, reading.result(), device)
        finally:
            self._devices.put(device)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)


def _load_linear_algebra(devices: list[str]) -> None:
    """Let torch load its solvers for GPUs once: two threads that do so together fail."""
    for device in dict.fromkeys(devices):
        torch.linalg.inv(torch.ones(1, 1, device=device))
