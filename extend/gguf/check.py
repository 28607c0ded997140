"""Is this a GGUF file that can be read: checked before anything is made of it.

The library that reads such files makes several objects of every value and believes every number, so
counts, lengths, types and offsets are first held against the file itself and against what models
have. Source: the GGUF specification (ggml, docs/gguf.md).
"""

import math
import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from extend.errors import CheckpointError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_VERSIONS = (2, 3)
_MAX_TENSORS, _MAX_KEYS, _MAX_VALUES = 2**17, 2**12, 2**22  # values: of all arrays together
_MAX_NAME_BYTES, _MAX_DIMENSIONS, _MAX_ELEMENTS = 2**10, 4, 2**53
_MAX_STRING_BYTES = 2**24


class _Damaged(Exception):
    pass


def check_gguf(path: Path) -> None:
    """Raise CheckpointError unless the header is whole and the tensors lie in the file."""
    from gguf import GGML_QUANT_SIZES

    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is no plain file")
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        with path.open("rb") as file:
            _Reader(file, os.fstat(file.fileno()).st_size).check(sizes)
    except _Damaged as error:
        raise CheckpointError(f"{path}: cannot be read as GGUF ({error}); fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


class _Reader:
    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._place, self._values = file, size, 0, 0
        self._order, self._alignment = "<", 32

    def check(self, quant_sizes: dict[int, tuple[int, int]]) -> None:
        if self._take(4) != b"GGUF":
            raise _Damaged("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise _Damaged(f"version {version}; read are {_VERSIONS}")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise _Damaged(f"it announces {tensors} tensors and {keys} keys")
        seen: set[bytes] = set()
        for _ in range(keys):
            self._key(seen)
        spans = [self._tensor(seen, quant_sizes) for _ in range(tensors)]
        begin = -(-self._place // self._alignment) * self._alignment
        self._check_spans(sorted(spans), begin)

    def _key(self, seen: set[bytes]) -> None:
        name = self._name("key", seen)
        kind = self._number("I")
        if name == b"general.alignment":
            value = self._number("I") if kind == _UINT32 else 0
            if value < 1 or value & (value - 1) or value > 2**20:
                raise _Damaged(f"general.alignment is {value}, not a power of two")
            self._alignment = value
            return
        self._skip(kind, name)

    def _skip(self, kind: int, name: bytes) -> None:
        if kind == _STRING:
            self._text(_MAX_STRING_BYTES, name)
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            self._values += count
            if self._values > _MAX_VALUES:
                raise _Damaged(f"the arrays up to {_shown(name)} hold {self._values} values")
            if inner == _STRING:
                for _ in range(count):
                    self._text(_MAX_STRING_BYTES, name)
            else:
                self._jump(count * self._size_of(inner, name))
        else:
            self._jump(self._size_of(kind, name))

    def _size_of(self, kind: int, name: bytes) -> int:
        if kind not in _SIZES:
            raise _Damaged(f"{_shown(name)} is of the type {kind}, which is not known there")
        return _SIZES[kind]

    def _tensor(self, seen: set[bytes],
                quant_sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
        name = self._name("tensor", seen)
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _Damaged(f"tensor {_shown(name)} has {dimensions} dimensions")
        shape = [self._number("Q") for _ in range(dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        count = math.prod(shape)
        if not 0 < count <= _MAX_ELEMENTS or kind not in quant_sizes:
            raise _Damaged(f"tensor {_shown(name)} has the shape {shape} and the type {kind}")
        block, num_bytes = quant_sizes[kind]
        if shape[0] % block or offset % self._alignment:
            raise _Damaged(f"tensor {_shown(name)} has rows of {shape[0]} in blocks of {block}, "
                           f"from byte {offset} on")
        return offset, offset + count // block * num_bytes

    def _check_spans(self, spans: list[tuple[int, int]], begin: int) -> None:
        end = 0
        for first, last in spans:
            if first < end:
                raise _Damaged(f"tensors overlap at byte {begin + first}")
            end = last
        if begin + end > self._size and spans:
            raise _Damaged(f"its tensors end at byte {begin + end:,}, but it has {self._size:,}; "
                           "it is truncated")

    def _name(self, what: str, seen: set[bytes]) -> bytes:
        name = self._text(_MAX_NAME_BYTES, what.encode())
        mark = what.encode() + b" " + name
        if mark in seen:
            raise _Damaged(f"{what} {_shown(name)} is there twice")
        seen.add(mark)
        return name

    def _text(self, most: int, where: bytes) -> bytes:
        length = self._number("Q")
        if length > most:
            raise _Damaged(f"a text of {length} bytes at {_shown(where)}")
        text = self._take(length)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"a text at {_shown(where)} is not UTF-8") from None
        return text

    def _number(self, kind: str) -> int:
        return struct.unpack(self._order + kind, self._take(struct.calcsize(f"<{kind}")))[0]

    def _jump(self, count: int) -> None:
        if self._place + count > self._size:
            raise _Damaged(f"it ends at byte {self._size:,}, amid its header")
        self._place += count
        self._file.seek(self._place)

    def _take(self, count: int) -> bytes:
        if self._place + count > self._size:
            raise _Damaged(f"it ends at byte {self._size:,}, amid its header")
        self._place += count
        return self._file.read(count)


def _shown(name: bytes) -> str:
    return repr(name[:80].decode("utf-8", "replace"))
