"""Many small tensors at once: each by one thread, rather than each by all."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")
_MOST_THREADS = 16


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work(item)` of all items on the CPU, in order, each by one of torch's threads alone.

    Tensors that are too small for several threads are worked on faster this way.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, _MOST_THREADS), "side", torch.set_num_threads,
                                (1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
