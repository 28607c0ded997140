"""The header of a safetensors file: which tensors it holds and where.

Every header is checked against the file's size, so a truncated shard is found before any work.
Whatever the format does not allow is refused, also where some reader would take it: a key that is
given twice, numbers that are no whole numbers, a shape whose product no reader can hold.
"""

import contextlib
import math
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from extend.errors import CheckpointError
from extend.untrusted import parse_json

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
               "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_MAX_DIMENSIONS = 64  # of torch
_MAX_ELEMENTS = 2**63 - 1
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
            "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16,
            "U32": torch.uint32, "U64": torch.uint64,
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
    return read_layout(path)[0]


def read_layout(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """The tensors of a file, and the byte at which each begins; see `read_header`."""
    try:
        state = path.stat()
        size = state.st_size
        if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
            raise CheckpointError(f"{path}: is a pipe or a device, not a file")
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file (header length {length} in "
                                      f"a file of {size} bytes); fetch it again")
            header = parse_json(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged safetensors header; fetch the file again "
                              f"({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    infos, begins = _check_header(header, path, body_bytes=size - 8 - length)
    return infos, {name: 8 + length + begin for name, begin in begins.items()}


def _check_header(header: object, path: Path,
                  body_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Check that the tensors tile the file's body exactly, without gap or overlap."""
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged safetensors header; fetch the file again")
    infos, begins, spans = {}, {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]))
            begin, end = entry["data_offsets"]
            fits = (len(info.shape) <= _MAX_DIMENSIONS
                    and all(type(n) is int and n >= 0 for n in (*info.shape, begin, end))
                    and math.prod(n for n in info.shape if n) <= _MAX_ELEMENTS
                    and end - begin == info.num_bytes)
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(f"{path}: the header entry of tensor {name!r} is not consistent; "
                                  "fetch the file again")
        infos[name], begins[name] = info, begin
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
    return infos, begins
