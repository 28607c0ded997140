"""Lazy safetensors in.

Tensors are read whole, in blocks of rows, or at single places, into memory of their own; files are
not mapped, because what was read of a map counts as memory of the process as long as it is open.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

from extend.checkpoint.ahead import will_need
from extend.checkpoint.header import DTYPE_BYTES, TensorInfo, read_layout, torch_dtype
from extend.errors import CheckpointError
from extend.model_config import read_json
from extend.untrusted import name_problem

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_PROBLEMS = 8  # of one message


class StoredTensor:
    """A tensor that stays on disk: threads read blocks of rows when they need them; see above.

    Attributes:
        info: its name, dtype and shape.
    """

    def __init__(self, path: Path, info: TensorInfo, begin: int):
        self.info, self._path, self._begin = info, path, begin
        self._file: int | None = None
        self._opening = threading.Lock()

    def __getitem__(self, rows: slice | EllipsisType) -> "torch.Tensor":
        """See `read`."""
        return self.read(rows)

    def part(self, row: int) -> "StoredTensor":
        """One row of the tensor, such as one expert's matrix, that stays on disk too."""
        one = self.info._replace(shape=self.info.shape[1:])
        return StoredTensor(self._path, one, self._begin + row * one.num_bytes)

    def fetch(self) -> None:
        """Let the system read all of it ahead; does not wait."""
        with self._reading() as file:
            will_need(file, self._begin, self.info.num_bytes)

    def read(self, rows: slice | EllipsisType = ..., *, pin: bool = False,
             into: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Rows `start:stop` of the tensor, or all of it; in its dtype, a tensor of its own.

        Args:
            pin: into pinned memory, from which a GPU copies faster and while others work.
            into: a buffer of bytes, large enough, in place of memory of its own; `fetch` first.

        Raises:
            CheckpointError: the file cannot be read, or became shorter.
        """
        import torch

        shape, row_bytes = self.info.shape, self.info.num_bytes
        start = 0
        if isinstance(rows, slice) and shape:
            row_bytes //= max(1, shape[0])
            start, stop, _ = rows.indices(shape[0])
            shape = (max(0, stop - start), *shape[1:])
        size = math.prod(shape) * DTYPE_BYTES[self.info.dtype]
        data = torch.empty(size, dtype=torch.uint8, pin_memory=pin) if into is None else into[:size]
        self._fill(memoryview(data.numpy()), self._begin + start * row_bytes, ahead=into is None)
        return data.view(torch_dtype(self.info.dtype)).view(shape)

    def take(self, index: "torch.Tensor") -> "torch.Tensor":
        """The elements at flat positions [m]; only the pages that hold them are read.

        Raises:
            CheckpointError: as `read`.
        """
        import torch

        size = DTYPE_BYTES[self.info.dtype]
        data = torch.empty(len(index) * size, dtype=torch.uint8)
        view, places = memoryview(data.numpy()), (self._begin + index * size).tolist()
        with self._reading() as file:
            for place in places:  # so that a disk fetches them side by side
                will_need(file, place, size)
            for number, place in enumerate(places):
                _fill(file, view[number * size:(number + 1) * size], place)
        return data.view(torch_dtype(self.info.dtype))

    def _fill(self, data: memoryview, offset: int, *, ahead: bool) -> None:
        with self._reading() as file:
            if ahead:
                will_need(file, offset + len(data), len(data))
            _fill(file, data, offset)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[int]:
        try:
            with self._opening:
                if self._file is None:
                    self._file = os.open(self._path, os.O_RDONLY)
            yield self._file
        except OSError as error:
            raise CheckpointError(f"{self._path}: tensor {self.info.name!r} cannot be read "
                                  f"({error.strerror})") from None

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _fill(file: int, data: memoryview, offset: int) -> None:
    filled = 0
    while filled < len(data):
        count = os.preadv(file, [data[filled:]], offset + filled)
        if not count:
            raise OSError(None, "the file ends too early")
        filled += count


class Checkpoint:
    """The tensors of a checkpoint directory, read one at a time.

    Args:
        directory: holds `model.safetensors`, or an index and its shards.

    Raises:
        CheckpointError: no safetensors weights, a shard missing or damaged, or an index that
            does not match its shards.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self._files = self._locate()
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, str] = {}
        self._begins: dict[str, int] = {}
        problems: list[str] = []
        for file in sorted(set(self._files)):
            problems += self._add_shard(file)
        if not problems:
            problems = self._index_problems()
        if problems:
            more = len(problems) - _MAX_PROBLEMS
            problems[_MAX_PROBLEMS:] = [f"and {more} problems more"] if more > 0 else []
            raise CheckpointError("; ".join(problems))
        self._say_stale()

    def _say_stale(self) -> None:
        """Name weights that lie beside those that are read, such as a shard of an earlier save."""
        stale = sorted(path.name for path in self.directory.glob("*.safetensors")
                       if path.name not in self._files)
        if stale:
            index = INDEX_NAME if self._weight_map else "a model without an index"
            log.warning("%s: %s is not read, because %s does not list it; delete what is left of "
                        "another save", self.directory, ", ".join(stale), index)

    def _add_shard(self, file: str) -> list[str]:
        try:
            header, begins = read_layout(self.directory / file)
        except CheckpointError as error:
            return [str(error)]
        twice = [f"{self.directory}: tensor {name!r} is in both {self._file_of[name]} and {file}"
                 for name in header if name in self.infos]
        self.infos.update(header)
        self._begins.update(begins)
        self._file_of.update(dict.fromkeys(header, file))
        return twice

    def _locate(self) -> list[str]:
        if (self.directory / INDEX_NAME).is_file():
            self._weight_map = read_json(self.directory / INDEX_NAME).get("weight_map")
            if not isinstance(self._weight_map, dict) or not self._weight_map:
                raise CheckpointError(f"{self.directory / INDEX_NAME}: holds no weight_map; fetch "
                                      "the checkpoint again")
            for file in self._weight_map.values():
                problem = name_problem(file)
                if problem is None and not file.endswith(".safetensors"):
                    problem = "is not the name of a file NAME.safetensors"
                if problem:
                    raise CheckpointError(f"{self.directory / INDEX_NAME}: {repr(file)[:300]} "
                                          f"{problem}")
            return list(self._weight_map.values())
        self._weight_map = {}
        if (self.directory / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        raise CheckpointError(f"{self.directory}: holds no {SINGLE_NAME} and no {INDEX_NAME}; only "
                              "safetensors weights are read, convert the checkpoint first")

    def _index_problems(self) -> list[str]:
        lines = [f"{self.directory / INDEX_NAME}: puts tensor {name!r} in {file}, but it is in "
                 f"{self._file_of.get(name, 'no shard')}"
                 for name, file in self._weight_map.items() if self._file_of.get(name) != file]
        return lines + [f"{self.directory}: the shards hold {name!r}, which the index does not list"
                        for name in self.infos
                        if self._weight_map and name not in self._weight_map]

    @property
    def names(self) -> list[str]:
        return sorted(self.infos)

    @property
    def file_of(self) -> dict[str, str]:
        """Tensor name -> name of its file."""
        return dict(self._file_of)

    @property
    def files(self) -> list[Path]:
        return [self.directory / file for file in sorted(set(self._files))]

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos.values())

    def stored(self, name: str) -> StoredTensor:
        """One tensor, to be read in blocks of rows."""
        return StoredTensor(self.directory / self._locate_tensor(name), self.infos[name],
                            self._begins[name])

    def _locate_tensor(self, name: str) -> str:
        if name not in self.infos:
            raise CheckpointError(f"{self.directory}: holds no tensor {name!r}")
        return self._file_of[name]

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor onto the CPU."""
        return self.stored(name).read()
