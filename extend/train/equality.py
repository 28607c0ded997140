"""What several processes hold alike is compared by hash.

Adapters start from a seed in every process, and what is not sharded over some dimension of the
mesh has replicas there; nothing of that is sent around afterwards, so a difference would go
unnoticed into the checkpoint.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from extend.errors import TrainingError
from extend.train.mesh import Processes

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_CHUNK = 2**22  # elements hashed at once
_ODD = 0x1E3779B97F4A7C15  # any odd number: a product with it is never 0 modulo 2^64


def check_equal(tensors: dict[str, Tensor], processes: Processes) -> None:
    """Check that processes that hold the same part of a tensor hold the same bits.

    A tensor that is no DTensor is held whole by all. All processes call it with the same names.

    Raises:
        TrainingError: the first tensor that differs, and in which processes. All raise it.
    """
    if processes.mesh is None or not tensors:
        return
    places = _gather([_place(tensor, processes.rank) for tensor in tensors.values()], processes)
    shared = [_is_shared(column) for column in places.T]
    if not any(shared):
        return
    hashes = _gather([hash_tensor(_local(tensor)) if common else 0
                      for tensor, common in zip(tensors.values(), shared)], processes)
    for name, place, values in zip(tensors, places.T.tolist(), hashes.T.tolist()):
        for other, rank in find_difference(place, values):
            raise TrainingError(
                f"{name} must be the same in processes {other} and {rank}, but its bits hash "
                f"to {values[other] % 2**64:016x} and {values[rank] % 2**64:016x}; a process "
                "has lost step with the others. Go on from the last checkpoint, and if it "
                "happens again see that all hosts have the same versions and sound memory")


def find_difference(places: Sequence[int], values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of processes whose places are the same and whose values differ.

    Each process is held against the one of lowest rank in its place.
    """
    first: dict[int, int] = {}
    for rank, place in enumerate(places):
        other = first.setdefault(place, rank)
        if values[rank] != values[other]:
            yield other, rank


def hash_tensor(tensor: Tensor) -> int:
    """64 bits of a tensor's bits. Two tensors that differ in one element never have the same.

    Every word is multiplied by an odd number of its own, and all are added, modulo 2^64.
    """
    words = tensor.detach().contiguous().flatten().view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, len(words), _CHUNK):
        part = words[begin:begin + _CHUNK].to(torch.int64)
        place = torch.arange(begin, begin + len(part), device=words.device)
        # Odd times odd is odd; the second factor stirs high bits into low ones.
        total += (part * ((2 * place + 1) * _ODD)).sum()
    return int(total)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _place(tensor: Tensor, rank: int) -> int:
    """A number that processes share which hold the same part of a tensor.

    Its sign says that a process holds nothing.
    """
    if not isinstance(tensor, DTensor):
        return 0
    if tensor.to_local().numel() == 0:
        return -1 - rank
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh,
                                                      tensor.placements)
    place = 0
    for size, begin in zip(tensor.shape, offset):
        place = place * size + begin
    return place


def _is_shared(column: Tensor) -> bool:
    return len(column.unique()) < len(column)


def _gather(values: list[int], processes: Processes) -> Tensor:
    """int64 [process, value] on the host."""
    own = torch.tensor(values, dtype=torch.int64, device=processes.device)
    all_values = own.new_empty(processes.world * len(values))
    dist.all_gather_into_tensor(all_values, own)
    return all_values.view(processes.world, len(values)).cpu()
