"""Checkpoints that are written while training goes on, from a copy in the host's memory."""

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from extend.errors import TrainingError
from extend.train.mesh import Processes
from extend.train.weights import local_part


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time.

    The copy stays for the next checkpoint; on CUDA it is pinned, so that it takes little time.

    Attributes:
        partial: the directory that is being written, or None.
        group: what the threads of all processes talk through; None where there is one process.
    """

    def __init__(self, processes: Processes):
        # The threads of all processes talk among themselves, beside whatever training does.
        self.group = dist.new_group(backend="gloo") if processes.mesh is not None else None
        if self.group is None:  # that is meant; a filter of the thread's own would not be safe
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._on_gpu = processes.device.type == "cuda"
        self._room: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self.partial: Path | None = None

    def begin(self, tensors: dict[str, Any], partial: Path, keep: Callable[[], None]) -> None:
        """Copy the tensors; then write them to `partial` and call `keep`, in the background.

        Whatever was begun before must have been waited for.
        """
        copies = {name: self._copy(name, value) for name, value in _flatten(tensors)}
        if self._on_gpu:
            torch.cuda.synchronize()
        self.partial = partial
        self._written = self._pool.submit(self._write, tensors, _Planner(copies), partial, keep)

    def _write(self, tensors: dict[str, Any], planner: "_Planner", partial: Path,
               keep: Callable[[], None]) -> None:
        dcp.save(tensors, checkpoint_id=partial, planner=planner, process_group=self.group,
                 no_dist=self.group is None)
        keep()

    def wait(self) -> None:
        """Wait until the writing has ended; raise what it raised."""
        written, self._written, self.partial = self._written, None, None
        if written is not None:
            written.result()

    def close(self) -> None:
        self._pool.shutdown()
        if self._on_gpu:
            for room in filter(Tensor.numel, self._room.values()):
                torch.cuda.cudart().cudaHostUnregister(room.data_ptr())

    def _copy(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        local = local_part(value)
        if type(local) not in (Tensor, torch.nn.Parameter):  # several, such as quantized moments
            return local.clone().cpu()
        return self._find_room(name, local).copy_(local, non_blocking=True)

    def _find_room(self, name: str, local: Tensor) -> Tensor:
        """Memory that a tensor is copied to, every time the same."""
        if name not in self._room:
            room = torch.empty(local.shape, dtype=local.dtype)
            if self._on_gpu and room.numel():  # not pin_memory=True, which rounds up
                code = torch.cuda.cudart().cudaHostRegister(
                    room.data_ptr(), room.numel() * room.element_size(), 0)
                if int(code):
                    raise TrainingError(f"pinning host memory for a checkpoint failed (code "
                                        f"{int(code)}); set save_in_background false")
            self._room[name] = room
        return self._room[name]


class _Planner(dcp.DefaultSavePlanner):
    """Lays out what the tensors are, and writes what their copies hold."""

    def __init__(self, copies: dict[str, Any]):
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._copies[index.fqn]


def _flatten(tensors: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value, by the name under which torch's distributed checkpoints know it."""
    for name, value in tensors.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
