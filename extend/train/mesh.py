"""Who computes what: all processes as data-parallel groups of context- and tensor-parallel ranks.

With tensor parallelism tp processes, neighbours in rank, compute the same tokens, each with its
share of heads, channels and vocabulary: a team. A phase with b rows a step on w teams has dp =
gcd(b, w / c) groups, where c is its `context_parallel`; each group of cp = w / dp teams shares its
rows, token by token, in tp rings, one of each team's first members, one of the second ones, and so
on. Parameters are sharded over all w, or over neighbouring ones with replicas in the others (HSDP).
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from extend.errors import CompatibilityError, LayoutError, TrainingError
from extend.registry import lookup
from extend.ring.kernels import KERNELS
from extend.ring.layouts import check_length
from extend.ring.strategies import divides, parse_strategy
from extend.train_options import Phase, TrainOptions


@dataclass(frozen=True)
class Processes:
    """This process among all.

    `mesh` is None where there is only one. Its dimensions are replicate (where there are replicas
    of parameters), shard, and tp (where tensor_parallel is not 1).
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None
    tensor_parallel: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def local_world(self) -> int:
        """Processes of a host; their ranks follow one another."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors [n, ...] of all processes as one [world * n, ...], in their order."""
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tensor_parallel

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """Those that compute the same tokens; None where each has tokens of its own."""
        return self.mesh["tp"] if self.mesh is not None and self.tensor_parallel > 1 else None

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """Those that compute other tokens with the same heads: what gradients are summed over."""
        if self.mesh is None:
            return None
        names = tuple(name for name in self.mesh.mesh_dim_names if name != "tp")
        return self.mesh[names]

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
        dp, cp: number of groups, and of ranks in each that have tokens of their own.
        dp_rank, cp_rank: of this process.
        ring: the ranks that share this process's rows; None in a run of one process.
    """

    dp: int
    cp: int
    dp_rank: int
    cp_rank: int
    ring: dist.ProcessGroup | None


def split_world(batch_rows: int, world: int, tensor_parallel: int = 1,
                context_parallel: int = 1) -> tuple[int, int]:
    """dp and cp of a phase, where at least `context_parallel` teams share a row."""
    teams = world // tensor_parallel
    dp = math.gcd(batch_rows, teams // min(context_parallel, teams))
    return dp, teams // dp


def split_phase(phase: Phase, world: int, tensor_parallel: int = 1) -> tuple[int, int]:
    """dp and cp of a phase."""
    return split_world(phase.batch_rows, world, tensor_parallel, phase.context_parallel)


def longest_local(options: TrainOptions, world: int) -> int:
    """The most tokens of one row that a process holds in any phase."""
    return max(phase.length // split_phase(phase, world, options.tensor_parallel)[1]
               for phase in options.schedule)


def check_world(options: TrainOptions, world: int) -> None:
    """Check that the processes divide as `tensor_parallel` and `shard_over` say.

    Raises:
        TrainingError: they do not, or a team would be spread over hosts.
    """
    tp, per_host = options.tensor_parallel, int(os.environ.get("LOCAL_WORLD_SIZE", world))
    for count, where in ((world, "there are"), (per_host, "each host has")):
        if count % tp:
            raise TrainingError(f"tensor_parallel is {tp}, but {where} {count} processes; choose a "
                                "number that divides them")
    if options.shard_over != "all" and (world // tp) % options.shard_over:
        raise TrainingError(
            f"shard_over is {options.shard_over}, but there are {world} processes with "
            f"tensor_parallel {tp}; choose a number that divides {world // tp}, or all")


def check_schedule(schedule: list[Phase], layout: str, world: int,
                   tensor_parallel: int = 1) -> None:
    """Check that every phase divides over its ranks.

    Raises:
        LayoutError: a length, or a `context_parallel`, that does not.
    """
    teams = world // tensor_parallel
    for phase in schedule:
        if teams % min(phase.context_parallel, teams):
            raise LayoutError(f"context_parallel {phase.context_parallel} does not divide {teams} "
                              f"processes{' of a team' * (tensor_parallel > 1)}; choose a divisor")
        check_length(phase.length, layout, split_phase(phase, world, tensor_parallel)[1])


def check_attention(options: TrainOptions, num_heads: int, world: int) -> None:
    """Check that the ring can run in every phase, so that a late one does not end a long run.

    Raises:
        RecipeError: no such kernel.
        CompatibilityError: heads or ranks that the strategy cannot divide.
    """
    if options.kernel != "auto":
        lookup(KERNELS, options.kernel, "kernel")
    family, number = parse_strategy(options.strategy)
    num_heads //= options.tensor_parallel
    for i, phase in enumerate(options.schedule):
        cp = split_phase(phase, world, options.tensor_parallel)[1]
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
    tp = processes.tensor_parallel
    dp, cp = split_phase(phase, processes.world, tp)
    if processes.mesh is None:
        return PhaseMesh(1, 1, 0, 0, None)
    sizes = {"dp": dp, "cp": cp} | ({"tp": tp} if tp > 1 else {})
    mesh = init_device_mesh(processes.device.type, tuple(sizes.values()),
                            mesh_dim_names=tuple(sizes))
    dp_rank, cp_rank = divmod(processes.rank // tp, cp)
    return PhaseMesh(dp, cp, dp_rank, cp_rank, mesh["cp"].get_group())


def mesh_of_one(device: torch.device) -> DeviceMesh:
    """A mesh for what needs one where there is one process; `join_processes` ends its group."""
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (1,))


@contextlib.contextmanager
def join_processes(options: TrainOptions | None = None) -> Iterator[Processes]:
    """Set up this process from the environment of the launcher, or as the only one.

    A process group that the caller has set up already is used and left as it is. Without `options`
    parameters are sharded over all processes, each with tokens of its own.

    Raises:
        TrainingError: as `check_world`.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else None
    if on_gpu:
        torch.cuda.set_device(device)
    device = device or torch.device("cpu")
    theirs = dist.is_initialized()
    if not theirs and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # gloo beside NCCL: host tensors, such as the state of a checkpoint, need it.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                device_id=device if on_gpu else None)
    try:
        world = dist.get_world_size() if dist.is_initialized() else 1
        tp = 1 if options is None else options.tensor_parallel
        mesh = _build_mesh(device, world, options) if world > 1 else None
        yield Processes(dist.get_rank() if world > 1 else 0, world, device, mesh, tp)
    finally:
        if dist.is_initialized() and not theirs:
            dist.destroy_process_group()


def _build_mesh(device: torch.device, world: int, options: TrainOptions | None) -> DeviceMesh:
    tp, shards = 1, world
    if options is not None:
        check_world(options, world)
        tp = options.tensor_parallel
        shards = world // tp if options.shard_over == "all" else options.shard_over
    sizes = {"replicate": world // (tp * shards), "shard": shards, "tp": tp}
    used = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    if tp > 1:  # torch would tell, in each process, that it gathers a matrix in two steps
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))
