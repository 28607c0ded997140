"""Whole tensors from the shards of all processes, without memory of the device."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from extend.errors import TrainingError
from extend.train.mesh import Processes
from extend.train.weights import own_part

Gather = Callable[[Tensor, torch.dtype], Tensor | None]
"""From a parameter and a dtype to the whole of it in that dtype, on the CPU; None where it is not
wanted."""


def make_gather(processes: Processes) -> Gather:
    """Gathering to the main process; all processes must ask for the same tensors in order."""
    return lambda tensor, dtype: gather(tensor, dtype, processes)


@torch.no_grad()
def gather(tensor: Tensor, dtype: torch.dtype, processes: Processes) -> Tensor | None:
    """The whole of a tensor on the CPU of the main process, None in the others.

    Shards travel from host to host, one at a time: a device has its own cast shard only, and a
    process that is not the main one holds nothing else.

    Raises:
        TrainingError: the shards do not make up the tensor.
        CompatibilityError: a shard that is not one block of it.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().to(dtype).cpu() if processes.is_main else None
    mine = own_part(tensor)
    parts: list[tuple[tuple[int, ...], tuple[int, ...]]] = [mine] * processes.world
    dist.all_gather_object(parts, mine)
    owners = {part: rank for rank, part in reversed(list(enumerate(parts)))}  # one of each replica
    local = tensor.to_local().to(dtype).cpu().contiguous()
    if not processes.is_main:
        if owners[mine] == processes.rank and local.numel():
            dist.send(local, 0)
        return None
    return _assemble(tensor.shape, local, owners)


def _assemble(shape: torch.Size, local: Tensor,
              owners: dict[tuple[tuple[int, ...], tuple[int, ...]], int]) -> Tensor:
    whole, count = local.new_empty(shape), 0
    for (offsets, sizes), rank in owners.items():
        part = local if rank == 0 else local.new_empty(sizes)
        if rank != 0 and part.numel():
            dist.recv(part, rank)
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = part
        count += part.numel()
    if count != shape.numel():
        raise TrainingError(f"the shards of a weight of shape {tuple(shape)} hold {count} "
                            f"elements, not {shape.numel()}; it cannot be written")
    return whole
