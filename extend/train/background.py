"""Checkpoints that are written while training goes on, from a copy in the host's memory."""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from extend.errors import TrainingError
from extend.train.mesh import Processes
from extend.train.weights import local_part


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time.

    The copy stays for the next checkpoint; on CUDA it is pinned, so that it takes little time.

    Attributes:
        partial: the directory that is being written, or None.
    """

    def __init__(self, processes: Processes):
        # The threads of all processes talk among themselves, beside whatever training does.
        self._group = dist.new_group(backend="gloo") if processes.mesh is not None else None
        if self._group is None:  # that is meant; a filter of the thread's own would not be safe
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._on_gpu = processes.device.type == "cuda"
        self._room: dict[tuple[str, ...], Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self.partial: Path | None = None

    def begin(self, tensors: dict[str, Any], partial: Path, keep: Callable[[], None]) -> None:
        """Copy the tensors; then write them to `partial` and call `keep`, in the background.

        Whatever was begun before must have been waited for.
        """
        copies = self._copy(tensors, ())
        if self._on_gpu:
            torch.cuda.synchronize()
        self.partial = partial
        self._written = self._pool.submit(self._write, copies, partial, keep)

    def _write(self, tensors: dict[str, Any], partial: Path, keep: Callable[[], None]) -> None:
        dcp.save(tensors, checkpoint_id=partial, process_group=self._group,
                 no_dist=self._group is None)
        keep()

    def wait(self) -> None:
        """Wait until the writing has ended; raise what it raised."""
        written, self._written, self.partial = self._written, None, None
        if written is not None:
            written.result()

    def close(self) -> None:
        self._pool.shutdown()
        if self._on_gpu:
            for room in self._room.values():
                torch.cuda.cudart().cudaHostUnregister(room.data_ptr())

    def _copy(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(part, (*path, name)) for name, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        local = local_part(value)
        if type(local) is not Tensor:  # of several tensors, such as quantized moments
            copy = local.clone().cpu()
        else:
            copy = self._find_room(path, local).copy_(local, non_blocking=True)
        return _HostShard(value, copy) if isinstance(value, DTensor) else copy

    def _find_room(self, path: tuple[str, ...], local: Tensor) -> Tensor:
        if path not in self._room:
            room = torch.empty(local.shape, dtype=local.dtype)
            if self._on_gpu and room.numel():  # not pin_memory=True, which rounds up
                code = torch.cuda.cudart().cudaHostRegister(
                    room.data_ptr(), room.numel() * room.element_size(), 0)
                if int(code):
                    raise TrainingError(f"pinning host memory for a checkpoint failed (code "
                                        f"{int(code)}); set save_in_background false")
            self._room[path] = room
        return self._room[path]


class _HostShard:
    """A copy of a shard, which torch's distributed checkpoints take for the shard itself.

    Its methods are those by which they ask DTensors for their parts.
    """

    def __init__(self, like: DTensor, local: Tensor):
        self._like, self._local = like, local

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return self._like.__create_write_items__(fqn, self._like)

    def __get_tensor_shard__(self, _: object) -> Tensor:
        return self._local
