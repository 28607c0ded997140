"""Who computes what: all processes as data-parallel groups of context-parallel ranks.

A phase with b rows a step on w processes has dp = gcd(b, w) groups; each group of cp = w / dp
processes shares its rows, token by token, in one ring. Parameters are sharded over all w.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from extend.errors import CompatibilityError
from extend.registry import lookup
from extend.ring.kernels import KERNELS
from extend.ring.layouts import check_length
from extend.ring.strategies import divides, parse_strategy
from extend.train_options import Phase, TrainOptions


@dataclass(frozen=True)
class Processes:
    """This process among all; `mesh` is flat over them and None where there is only one."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all processes, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Any) -> Any:
        """What the main process has, in all; it is pickled."""
        held = [value]
        if self.mesh is not None:
            dist.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


@dataclass(frozen=True)
class PhaseMesh:
    """How the rows of one phase are dealt out.

    Attributes:
        dp, cp: number of groups, and of ranks in each.
        dp_rank, cp_rank: of this process.
        ring: the ranks that share this process's rows; None in a run of one process.
    """

    dp: int
    cp: int
    dp_rank: int
    cp_rank: int
    ring: dist.ProcessGroup | None


def split_world(batch_rows: int, world: int) -> tuple[int, int]:
    """dp and cp of a phase."""
    dp = math.gcd(batch_rows, world)
    return dp, world // dp


def check_schedule(schedule: list[Phase], layout: str, world: int) -> None:
    """Check that every phase divides over its ranks.

    Raises:
        LayoutError: a length that does not.
    """
    for phase in schedule:
        check_length(phase.length, layout, split_world(phase.batch_rows, world)[1])


def check_attention(options: TrainOptions, num_heads: int, world: int) -> None:
    """Check that the ring can run in every phase, so that a late one does not end a long run.

    Raises:
        RecipeError: no such kernel.
        CompatibilityError: heads or ranks that the strategy cannot divide.
    """
    if options.kernel != "auto":
        lookup(KERNELS, options.kernel, "kernel")
    family, number = parse_strategy(options.strategy)
    for i, phase in enumerate(options.schedule):
        cp = split_world(phase.batch_rows, world)[1]
        parts = cp if family == "ulysses" else number
        if cp == 1 or parts is None:
            continue
        if not divides(family, parts, num_heads, cp):
            heads = "" if family == "double-ring" else f" and the model's {num_heads} query heads"
            raise CompatibilityError(
                f"phase {i + 1}: strategy {options.strategy!r} divides the {cp} processes of a "
                f"ring{heads} by {parts}, which leaves a remainder; use strategy auto")


def phase_mesh(phase: Phase, processes: Processes) -> PhaseMesh:
    """The groups of a phase. Every process must call this for every phase, in order."""
    dp, cp = split_world(phase.batch_rows, processes.world)
    if processes.mesh is None:
        return PhaseMesh(1, 1, 0, 0, None)
    mesh = init_device_mesh(processes.device.type, (dp, cp), mesh_dim_names=("dp", "cp"))
    return PhaseMesh(dp, cp, processes.rank // cp, processes.rank % cp, mesh["cp"].get_group())


@contextlib.contextmanager
def join_processes() -> Iterator[Processes]:
    """Set up this process from the environment of the launcher, or as the only one.

    A process group that the caller has set up already is used and left as it is.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else None
    if on_gpu:
        torch.cuda.set_device(device)
    device = device or torch.device("cpu")
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if ours:
        # gloo beside NCCL: host tensors, such as the state of a checkpoint, need it.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                device_id=device if on_gpu else None)
    try:
        world = dist.get_world_size() if dist.is_initialized() else 1
        mesh = init_device_mesh(device.type, (world,)) if world > 1 else None
        yield Processes(dist.get_rank() if world > 1 else 0, world, device, mesh)
    finally:
        if ours:
            dist.destroy_process_group()
