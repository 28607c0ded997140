"""Lazy safetensors in, sharded and atomic safetensors out.

Reading opens files by memory map and checks every header against the file's size, so a truncated
shard is found before any work. Writing puts the header first (all sizes are known) and then the
bodies one by one, whole or in blocks of rows, so memory is bounded by the largest of these.
"""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from extend.errors import CheckpointError
from extend.model_config import read_json
from extend.output import require_space, write_json

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
_MAX_PROBLEMS = 8  # of one message
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
               "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


class TensorInfo(NamedTuple):
    """A tensor as its header describes it; `dtype` is the safetensors name, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BYTES[self.dtype]


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors dtype name."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
            "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
            "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
            "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[name]


def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch dtype."""
    for name in DTYPE_BYTES:
        with contextlib.suppress(KeyError):
            if torch_dtype(name) == dtype:
                return name
    raise CheckpointError(f"dtype {dtype} cannot be stored in safetensors")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read a safetensors header and check it against the size of the file.

    Raises:
        CheckpointError: missing, truncated or damaged file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file (header length {length} in "
                                      f"a file of {size} bytes); fetch it again")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete") from None
    except (ValueError, UnicodeDecodeError, RecursionError):
        raise CheckpointError(f"{path}: damaged safetensors header; fetch the file again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return _check_header(header, path, body_bytes=size - 8 - length)


def _check_header(header: object, path: Path, body_bytes: int) -> dict[str, TensorInfo]:
    """Check that the tensors tile the file's body exactly, without gap or overlap."""
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged safetensors header; fetch the file again")
    infos, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            info = TensorInfo(name, entry["dtype"], tuple(int(n) for n in entry["shape"]))
            begin, end = entry["data_offsets"]
            fits = min((*info.shape, begin), default=0) >= 0 and end - begin == info.num_bytes
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(f"{path}: the header entry of tensor {name!r} is not consistent; "
                                  "fetch the file again")
        infos[name] = info
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path}: tensors overlap or leave a gap at byte {position}; "
                                  "fetch the file again")
        position = end
    if position != body_bytes:
        raise CheckpointError(f"{path}: the header describes {position} bytes of tensors but the "
                              f"file holds {body_bytes}; it is truncated or damaged, fetch it "
                              "again")
    return infos


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
        self._open: dict[str, object] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, str] = {}
        problems: list[str] = []
        for file in sorted(set(self._files)):
            problems += self._add_shard(file)
        if not problems:
            problems = self._index_problems()
        if problems:
            more = len(problems) - _MAX_PROBLEMS
            problems[_MAX_PROBLEMS:] = [f"and {more} problems more"] if more > 0 else []
            raise CheckpointError("; ".join(problems))

    def _add_shard(self, file: str) -> list[str]:
        try:
            header = read_header(self.directory / file)
        except CheckpointError as error:
            return [str(error)]
        twice = [f"{self.directory}: tensor {name!r} is in both {self._file_of[name]} and {file}"
                 for name in header if name in self.infos]
        self.infos.update(header)
        self._file_of.update(dict.fromkeys(header, file))
        return twice

    def _locate(self) -> list[str]:
        if (self.directory / INDEX_NAME).is_file():
            self._weight_map = read_json(self.directory / INDEX_NAME).get("weight_map")
            if not isinstance(self._weight_map, dict) or not self._weight_map:
                raise CheckpointError(f"{self.directory / INDEX_NAME}: holds no weight_map; fetch "
                                      "the checkpoint again")
            for file in self._weight_map.values():
                if not isinstance(file, str) or Path(file).name != file:
                    raise CheckpointError(f"{self.directory / INDEX_NAME}: {file!r} is not a file "
                                          "name in this directory")
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

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor onto the CPU."""
        from safetensors import SafetensorError, safe_open

        if name not in self.infos:
            raise CheckpointError(f"{self.directory}: holds no tensor {name!r}")
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.directory / file, framework="pt")
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.directory / file}: tensor {name!r} cannot be read "
                                  f"({error})") from None


def write_safetensors(path: Path, infos: Sequence[TensorInfo],
                      read: "Callable[[str], torch.Tensor | Iterator[torch.Tensor]]",
                      metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, tensor by tensor.

    Args:
        infos: every tensor in the order of the file.
        read: called once per name, in order; must return the dtype and shape announced, or
            blocks of rows that make up such a tensor, so that memory is bounded by a block.
    """
    require_space(path.parent, sum(info.num_bytes for info in infos))
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    position = 0
    for info in infos:
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape),
                             "data_offsets": [position, position + info.num_bytes]}
        position += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for info in infos:
            _write_body(file, read(info.name), info)
        file.flush()
        os.fsync(file.fileno())


def _write_body(file: IO[bytes], value: "torch.Tensor | Iterator[torch.Tensor]",
                info: TensorInfo) -> None:
    rows = 0
    for block in value if isinstance(value, Iterator) else [value]:
        shape = (block.shape[0], *info.shape[1:]) if info.shape and block.dim() else info.shape
        file.write(_tensor_bytes(block, info._replace(shape=shape)))
        rows += block.shape[0] if block.dim() else 1
    if rows != (info.shape[0] if info.shape else 1):
        raise CheckpointError(f"tensor {info.name!r} was announced as {info.dtype} "
                              f"{info.shape} but came with {rows} rows")


def _tensor_bytes(tensor: "torch.Tensor", info: TensorInfo) -> memoryview:
    import torch

    if tuple(tensor.shape) != info.shape or tensor.dtype != torch_dtype(info.dtype):
        raise CheckpointError(f"tensor {info.name!r} was announced as {info.dtype} {info.shape} "
                              f"but is {tensor.dtype} {tuple(tensor.shape)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def write_checkpoint(directory: Path, infos: Sequence[TensorInfo],
                     read: "Callable[[str], torch.Tensor | Iterator[torch.Tensor]]", *,
                     max_shard_bytes: int = MAX_SHARD_BYTES,
                     file_of: Mapping[str, str] | None = None) -> None:
    """Write the weights of a checkpoint: one file, or shards and their index.

    `directory` should come from `atomic_directory`. Memory is bounded by the largest tensor.

    Args:
        file_of: tensor name -> name of its file, to shard like another checkpoint; without it
            a file is filled up to `max_shard_bytes`.
    """
    require_space(directory, sum(info.num_bytes for info in infos))
    shards = _plan_shards(infos, max_shard_bytes) if file_of is None else {
        file: [info for info in infos if file_of[info.name] == file]
        for file in sorted({file_of[info.name] for info in infos})}
    weight_map = {}
    for file, shard in shards.items():
        write_safetensors(directory / file, shard, read)
        weight_map.update({info.name: file for info in shard})
    if set(shards) == {SINGLE_NAME}:
        return
    total = sum(info.num_bytes for info in infos)
    write_json(directory / INDEX_NAME,
               {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(infos: Sequence[TensorInfo], max_shard_bytes: int) -> dict[str, list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if shards[-1] and filled + info.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.num_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
            for number, shard in enumerate(shards, start=1)}


_SIDE_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
                  "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
                  "*.py", "LICENSE*", "NOTICE*")


def copy_side_files(source: Path, destination: Path, *, max_len: int) -> None:
    """Copy what a checkpoint holds beside weights and config, made fit for `max_len` tokens.

    Tokenizer, vocabulary, chat templates, model code, licence and `generation_config.json`. The
    tokenizer's `model_max_length` becomes `max_len`, because loaders cut or refuse longer prompts
    otherwise; a `max_length` of the generation config is dropped, because it is the old length.
    """
    for file in sorted({f for pattern in _SIDE_PATTERNS for f in source.glob(pattern)}):
        if file.is_file():
            shutil.copyfile(file, destination / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, destination / templates.name)
    if (source / "tokenizer_config.json").is_file():
        settings = read_json(source / "tokenizer_config.json")
        write_json(destination / "tokenizer_config.json", {**settings, "model_max_length": max_len})
    if (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
        generation.pop("max_length", None)
        write_json(destination / "generation_config.json", generation)
