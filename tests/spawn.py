"""Run a function on several gloo processes, for tests.

    def work(rank, world, length): ...            # a module-level function; default group is set up
    results = spawn(2, work, 128)                 # what each rank returned, in rank order

A rank that raises fails the test with that rank's traceback; a ring that waits for a message that
never comes fails after a minute. Processes are forked from a server that has loaded torch and
transformers once, in seconds, so that each call costs only a fraction of one.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)

# What the processes would otherwise import one by one, part of it deep inside their first call.
PRELOAD = ["torch", "torch._dynamo", "transformers.models.llama.modeling_llama", "peft",
           "matplotlib.pyplot", "extend.ring", "extend.train.loop", "extend.cli", "extend.run",
           "extend.adapter", "extend.merge", "extend.evaluate", "pytest", "tests.frozen"]


def spawn(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Return `[fn(rank, world, *args) for each rank]`, run at once on `world` processes.

    `fn` must be importable (defined at the top of a module); arguments and results are pickled,
    and tensors in them are copied. Each process runs on one thread.
    """
    mp.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as directory:
        mp.start_processes(
            _run, (world, directory, fn, args), nprocs=world, start_method="forkserver"
        )
        files = [Path(directory) / f"result_{rank}.pt" for rank in range(world)]
        return [torch.load(file, weights_only=False) for file in files]


def _run(
    rank: int, world: int, directory: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", f"file://{directory}/store", timeout=TIMEOUT, rank=rank, world_size=world
    )
    try:
        result = fn(rank, world, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    torch.save(result, Path(directory) / f"result_{rank}.pt")
