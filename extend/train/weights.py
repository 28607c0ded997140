"""Weights straight from the file to where they are trained: no process ever holds them all.

A model is built without values, adapted and sharded, given memory, and then each process reads the
rows of its own shards. The processes do not talk to one another about it.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from extend.checkpoint import Checkpoint, StoredTensor
from extend.errors import CompatibilityError

_BLOCK_BYTES = 2**26  # read at once


def place_module(module: nn.Module, device: torch.device) -> None:
    """Give parameters memory on `device`, without values where they had none; move the buffers.

    Tied parameters stay one, which `nn.Module.to_empty` alone does not see to, and buffers keep
    their values, which it would lose.
    """
    if not any(p.is_meta for p in module.parameters()):
        module.to(device)
        return
    ties = shared_names(module)
    buffers = {name: buffer.to(device, copy=True) for name, buffer in module.named_buffers()
               if not buffer.is_meta}
    module.to_empty(device=device)
    for first, *others in ties:
        for name in others:
            replace_parameter(module, name, module.get_parameter(first))
    with torch.no_grad():
        for name, values in buffers.items():
            module.get_buffer(name).copy_(values)


def shared_names(module: nn.Module) -> list[list[str]]:
    """The names of every parameter, in order; several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` in the place of the one of that name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have without adapters, aliases included."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" not in name:
            found[name.replace(".base_layer.", ".")] = parameter
    return found


@torch.no_grad()
def fill_weights(model: nn.Module, source: Checkpoint) -> None:
    """Read every parameter but those of adapters, or this process's shard of it, from the file.

    Raises:
        CompatibilityError: a shard that is not one block of its tensor.
        CheckpointError: the file cannot be read, or lacks a tensor.
    """
    filled = set()
    parameters = plain_parameters(model)
    # Names that the file has come first: of a tied tensor it may hold the second one only.
    for name in sorted(parameters, key=lambda name: name not in source.infos):
        if id(parameters[name]) not in filled:
            filled.add(id(parameters[name]))
            _fill(parameters[name], source.stored(name))


def _fill(parameter: Tensor, stored: StoredTensor) -> None:
    (offsets, sizes), local = own_part(parameter), local_part(parameter)
    if local.dim() == 0:
        local.copy_(stored.read())
    if local.dim() == 0 or local.numel() == 0:
        return
    done = 0
    for block in read_rows(stored, offsets[0], offsets[0] + sizes[0], pin=local.is_cuda):
        for dim in range(1, local.dim()):
            block = block.narrow(dim, offsets[dim], sizes[dim])
        # To the device first, which casts faster.
        local[done:done + len(block)] = block.to(local.device)
        done += len(block)


def own_part(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this process's part of a tensor begins in the whole, and the sizes of the part.

    Raises:
        CompatibilityError: a part that is not one block of the whole.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    _require_blocks(tensor)
    [chunk] = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _require_blocks(tensor: DTensor) -> None:
    """Refuse a dimension that is sharded twice and does not divide: its parts interleave."""
    for placement in tensor.placements:
        if getattr(placement, "split_factor", 1) == 1:
            continue
        parts = 1
        for size, other in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            parts *= size if other.is_shard(placement.dim) or other is placement else 1
        if tensor.shape[placement.dim] % parts:
            raise CompatibilityError(
                f"a weight of shape {tuple(tensor.shape)} does not divide over {parts} processes "
                f"in dimension {placement.dim}; use fewer, or no tensor parallel")


def read_rows(stored: StoredTensor, start: int = 0, stop: int | None = None, *,
              pin: bool = False) -> Iterator[Tensor]:
    """Rows `start:stop` in blocks of 64 MiB or one row; the next is read while one is used."""
    shape = stored.info.shape
    if not shape:
        yield stored.read(pin=pin)
        return
    stop = shape[0] if stop is None else stop
    rows = max(1, _BLOCK_BYTES * shape[0] // max(1, stored.info.num_bytes))
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
        ahead: deque[Future[Tensor]] = deque()
        for begin in range(start, stop, rows):
            ahead.append(pool.submit(stored.read, slice(begin, min(begin + rows, stop)), pin=pin))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def is_same(a: StoredTensor, b: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether two tensors of a file are equal once they are cast to `dtype`."""
    return a.info.shape == b.info.shape and all(
        torch.equal(x.to(dtype), y.to(dtype)) for x, y in zip(read_rows(a), read_rows(b)))
