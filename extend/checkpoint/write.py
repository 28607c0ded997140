"""Sharded safetensors out: the header first (all sizes are known), then the bodies one by one.

Bodies come whole or in blocks of rows, so memory is bounded by the largest of these. They are
hashed as they are written, each in a thread of its own, while the next block is made. The disk is
told to begin at once: left alone it would begin at the end, when everything waits for it.
"""

import hashlib
import json
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from extend.checkpoint.header import TensorInfo, torch_dtype
from extend.checkpoint.read import INDEX_NAME, SINGLE_NAME
from extend.errors import CheckpointError
from extend.output import finished_files, keep_finished, require_space, write_json

if TYPE_CHECKING:
    import torch

    ReadTensor = Callable[[str], torch.Tensor | Iterator[torch.Tensor]]

MAX_SHARD_BYTES = 5_000_000_000
_PENDING_BYTES = 2**26  # handed over but not yet written; what is larger is waited for
_SPAN_BYTES = 2**25  # after so much the disk is told to begin


class _Sink:
    """A new file that is written and hashed in the background. A context manager.

    Memory that was handed over must not change any more. The file has a temporary name until the
    block ends without an error.

    Args:
        sync: wait until the disk has it, and record its hash; see `keep_finished`.
    """

    def __init__(self, path: Path, sync: bool):
        self._sync = sync
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._hash = hashlib.sha256()
        self._steps = [self._write, self._hash.update] if sync else [self._write]
        self._lanes = [ThreadPoolExecutor(1) for _ in self._steps]
        self._begun = self._written = 0
        self._pending: deque[tuple[int, list[Future]]] = deque()
        self._pending_bytes = 0

    def __enter__(self) -> "_Sink":
        self._file = self._partial.open("wb")
        return self

    def put(self, data: bytes | memoryview) -> None:
        """Append data; returns while up to `_PENDING_BYTES` are still on their way."""
        self._pending.append((len(data), [
            lane.submit(step, data) for lane, step in zip(self._lanes, self._steps, strict=True)]))
        self._pending_bytes += len(data)
        self._wait(_PENDING_BYTES)

    def _write(self, data: bytes | memoryview) -> None:
        self._written += self._file.write(data)
        if self._sync and self._written - self._begun >= _SPAN_BYTES:
            _begin_writing(self._file.fileno(), self._begun, self._written - self._begun)
            self._begun = self._written

    def _wait(self, limit: int) -> None:
        while self._pending and self._pending_bytes > limit:
            size, futures = self._pending.popleft()
            self._pending_bytes -= size
            for future in futures:
                future.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for lane in self._lanes:
                lane.shutdown(cancel_futures=True)
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._wait(-1)
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())
        self._partial.replace(self._path)
        if self._sync:
            keep_finished(self._path, self._hash.hexdigest())


def _begin_writing(file: int, offset: int, num_bytes: int) -> None:
    """Let the system send to the disk what was written, where it takes such advice.

    Linux answers the advice that pages are not needed by writing those that are changed, and does
    not wait for it.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def write_safetensors(path: Path, infos: Sequence[TensorInfo], read: "ReadTensor",
                      metadata: dict[str, str] | None = None, *, sync: bool = True) -> None:
    """Write one safetensors file, tensor by tensor; it appears under its name when it is whole.

    Args:
        infos: every tensor in the order of the file.
        read: called once per name, in order; must return the dtype and shape announced, or
            blocks of rows that make up such a tensor, so that memory is bounded by a block. What
            it returned is still being written when it is called again.
        sync: wait until the disk has it; not needed for what can be made again.
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
    with _Sink(path, sync) as sink:
        sink.put(struct.pack("<Q", len(text)) + text)
        for info in infos:
            _write_body(sink, read(info.name), info)


def _write_body(sink: _Sink, value: "torch.Tensor | Iterator[torch.Tensor]",
                info: TensorInfo) -> None:
    rows = 0
    for block in value if isinstance(value, Iterator) else [value]:
        shape = (block.shape[0], *info.shape[1:]) if info.shape and block.dim() else info.shape
        sink.put(_tensor_bytes(block, info._replace(shape=shape)))
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


def write_checkpoint(directory: Path, infos: Sequence[TensorInfo], read: "ReadTensor", *,
                     max_shard_bytes: int = MAX_SHARD_BYTES,
                     file_of: Mapping[str, str] | None = None, threads: int = 1) -> None:
    """Write the weights of a checkpoint: one file, or shards and their index.

    `directory` should come from `atomic_directory`; shards that are finished in it already stay.
    Memory is bounded by the largest tensor, or block of rows.

    Args:
        file_of: tensor name -> name of its file, to shard like another checkpoint; without it
            a file is filled up to `max_shard_bytes`.
        threads: shards to write at once; above 1, `read` is called from several threads.
    """
    shards = _plan_shards(infos, max_shard_bytes) if file_of is None else {
        file: [info for info in infos if file_of[info.name] == file]
        for file in sorted({file_of[info.name] for info in infos})}
    missing = {file: shard for file, shard in shards.items()
               if file not in finished_files(directory)}
    require_space(directory, sum(info.num_bytes for shard in missing.values() for info in shard))
    _write_shards(directory, missing, read, threads)
    if set(shards) == {SINGLE_NAME}:
        return
    total = sum(info.num_bytes for info in infos)
    write_json(directory / INDEX_NAME, {
        "metadata": {"total_size": total},
        "weight_map": {info.name: file for file, shard in shards.items() for info in shard}})


def _write_shards(directory: Path, shards: Mapping[str, list[TensorInfo]], read: "ReadTensor",
                  threads: int) -> None:
    if threads == 1:
        for file, shard in shards.items():
            write_safetensors(directory / file, shard, read)
        return
    stop = threading.Event()

    def read_unless_stopped(name: str) -> "torch.Tensor | Iterator[torch.Tensor]":
        if stop.is_set():
            raise CheckpointError("stopped, because another shard could not be written")
        return read(name)

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(write_safetensors, directory / file, shard, read_unless_stopped)
                   for file, shard in shards.items()]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            stop.set()
            raise


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
