"""What a GGUF file says of itself; its tensors stay on disk."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.errors import CheckpointError, CompatibilityError
from extend.gguf.check import check_gguf

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_MAX_PARTS = 2048


class Header:
    """The metadata and tensors of a GGUF model, in one file or in the parts of one.

    Attributes:
        paths: of the file, or of all parts in order.
        architecture: llama.cpp's name for it, such as `gemma3`.
        tensors: name -> tensor, of which nothing is read yet.

    Raises:
        CheckpointError: no such file, a part missing, or no GGUF.
        CompatibilityError: the package that reads such files is not installed.
    """

    def __init__(self, path: Path):
        self.paths = list_parts(path)
        readers = [_open(part) for part in self.paths]
        self._fields = readers[0].fields
        self._known: dict[str, Any] = {}
        count = self.get("split.count") or 1
        if count != len(self.paths):
            raise CheckpointError(f"{path}: is one of {count} parts, but its name is not that of a "
                                  "part; give the first as NAME-00001-of-0000N.gguf, with the "
                                  "others beside it")
        self.tensors: dict[str, ReaderTensor] = {}
        for part, reader in zip(self.paths, readers, strict=True):
            for tensor in reader.tensors:
                if tensor.name in self.tensors:
                    raise CheckpointError(f"{part}: tensor {tensor.name!r} is in another part too; "
                                          "the parts are not of one model")
                self.tensors[tensor.name] = tensor
        self.architecture = str(self.need("general.architecture"))

    @property
    def path(self) -> Path:
        return self.paths[0]

    @property
    def keys(self) -> list[str]:
        return list(self._fields)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key: a number, text, or a list."""
        if key not in self._known:
            if key not in self._fields:
                return default
            self._known[key] = self._fields[key].contents()  # slow for a whole vocabulary
        return self._known[key]

    def need(self, key: str) -> Any:
        """The value of a key that must be there."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: the key {key} is missing; fetch the file again, "
                                  "or convert the model anew")
        return value

    def of_model(self, key: str, default: Any = None) -> Any:
        """The value of a key below the name of the architecture, such as `block_count`."""
        return self.get(f"{self.architecture}.{key}", default)

    def need_of_model(self, key: str) -> Any:
        return self.need(f"{self.architecture}.{key}")


def list_parts(path: Path) -> list[Path]:
    """The parts of a model that was split over files, or the file alone.

    Raises:
        CheckpointError: a part is not there.
    """
    match = _PART.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match and not 1 <= int(match["number"]) <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: is no part of a model; parts are NAME-00001-of-0000N.gguf, "
                              f"and at most {_MAX_PARTS}")
    parts = [path] if match is None else [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing[:4])} is not there" + (
            f"; all {count} parts are needed" if count > 1 else "; give a GGUF file"))
    return parts


def _open(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CompatibilityError("reading GGUF files needs the package gguf; install it with "
                                 "`pip install 'extend-context[gguf]'`") from None
    check_gguf(path)
    try:
        return GGUFReader(path)
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as GGUF ({error}); fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
