"""Memory that the GPUs of one host share, and flags in it that streams write and wait for.

torch makes the memory and maps it into every process; the CUDA driver is called through ctypes for
what torch has no name for.

Flags are 32-bit words behind a buffer's data, 1 for yes. Of those in rank r's memory, word o says
that o has written what r may read, and word world + o that o has read what r may overwrite. Rank o
sets them and r takes them back, always in turn, so that none is lost; once everybody has read what
was published, all are what they were at first.
"""

import ctypes
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extend.errors import CompatibilityError

ALIGNMENT = 256  # of the flags, in bytes
LOOKING_SECONDS = 5.0  # for a copy of some flags on a GPU whose queues may all be stuck

_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_FENCED = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: after all that the stream wrote, seen by every GPU
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


@functools.cache
def load_driver() -> ctypes.CDLL:
    """The CUDA driver.

    Raises:
        OSError: there is none.
        AttributeError: it is too old.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        arguments = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        getattr(driver, name).argtypes = arguments
    driver.cuThreadExchangeStreamCaptureMode.argtypes = [ctypes.POINTER(ctypes.c_int)]
    return driver


class StreamWords:
    """Words in memory that a stream writes and waits for, without a kernel.

    Source: CUDA driver API, "Stream Memory Operations".
    """

    def __init__(self, driver: Any, stream: Callable[[], int], gpu: int = 0):
        """`driver` is `load_driver()`; `stream()` is the handle of the stream in use on `gpu`."""
        self._driver, self._stream, self._gpu = driver, stream, gpu

    def write(self, addresses: Iterable[int], value: int) -> None:
        """Write `value` when the stream has done all that it holds now.

        Raises:
            RuntimeError: the driver refuses.
        """
        self._call("write", self._driver.cuStreamWriteValue32_v2, addresses, value, _FENCED)

    def wait(self, addresses: Iterable[int]) -> None:
        """Hold up what the stream gets from now on until each word is 1.

        Raises:
            RuntimeError: the driver refuses.
        """
        self._call("wait for", self._driver.cuStreamWaitValue32_v2, addresses, 1, _EQUAL)

    def _call(
        self, what: str, function: Callable[..., int], addresses: Iterable[int], *arguments: int
    ) -> None:
        stream = self._stream()
        for address in addresses:
            status = function(stream, address, *arguments)
            if status == _NO_CONTEXT:
                # A thread's first call to CUDA may be this one: autograd's for GPU 0, where every
                # thread is from the start. The runtime would have made the context current.
                _make_context_current(self._driver, self._gpu)
                status = function(stream, address, *arguments)
            _check(status, f"{what} a flag from a stream")


def _make_context_current(driver: Any, gpu: int) -> None:
    """Make the context that torch uses on `gpu` the current one of this thread."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(device), gpu), f"find GPU {gpu}")
    status = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    _check(status, f"find the context of GPU {gpu}")
    _check(driver.cuCtxSetCurrent(context), f"use the context of GPU {gpu}")


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver cannot {what} (error {status})")


class Flags(NamedTuple):
    """What one rank's flags say: whether each rank, in order, has written and has read."""

    written: Sequence[bool]
    read: Sequence[bool]


def flags_begin(size_bytes: int) -> int:
    """Where the flags behind `size_bytes` of data begin, in bytes."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def first_flags(world: int) -> Tensor:
    """What the flags are at first, int32 [2 * world]: nothing is written, all is read."""
    return torch.tensor([0] * world + [1] * world, dtype=torch.int32)


class CudaBuffer:
    """Symmetric memory of torch, with flags behind the data."""

    def __init__(
        self, handle: Any, seats: Sequence[int], rank: int, flags_at: int, words: StreamWords,
        look: Callable[[], Sequence[int] | None],
    ):  # fmt: skip
        """`handle` is torch's, of the ranks' memory by their `seats`; `flags_at` is in bytes.

        `look()` gives this rank's own flags as they are now, or None.
        """
        self._handle, self._seats, self._words, self._look = handle, tuple(seats), words, look
        world = len(self._seats)
        self._others = [r for r in range(world) if r != rank]
        starts = [handle.buffer_ptrs[seat] + flags_at for seat in self._seats]
        # Of this rank's flags: those about each rank. Of each rank's: those about this one.
        self._written = [starts[rank] + 4 * r for r in range(world)]
        self._read = [starts[rank] + 4 * (world + r) for r in range(world)]
        self._their_written = [start + 4 * rank for start in starts]
        self._their_read = [start + 4 * (world + rank) for start in starts]

    def view(self, owner: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The beginning of what `owner` holds."""
        return self._handle.get_buffer(self._seats[owner], tuple(shape), dtype)

    def wait_until_read(self) -> None:
        """Wait for every other rank's `say_read`, and take it back."""
        read = [self._read[r] for r in self._others]
        self._words.wait(read)  # for all before the first is taken: `look` then tells who is late
        self._words.write(read, 0)

    def say_written(self) -> None:
        """Tell every other rank that it may read."""
        self._words.write([self._their_written[r] for r in self._others], 1)

    def wait_until_written(self, owner: int) -> None:
        """Wait for `owner`'s `say_written`."""
        self._words.wait([self._written[owner]])

    def say_read(self, owner: int) -> None:
        """Take `owner`'s `say_written` back, then tell it that it may overwrite what it holds."""
        self._words.write([self._written[owner]], 0)
        self._words.write([self._their_read[owner]], 1)

    def look(self) -> Flags | None:
        """What is said to this rank now, past all streams; None if that cannot be found out."""
        values = self._look()
        if values is None:
            return None
        said = [bool(value) for value in values]
        return Flags(said[: len(self._seats)], said[len(self._seats) :])


class CudaMark:
    """The end of what a stream held."""

    def __init__(self, index: int):
        """Of the stream in use on GPU `index`."""
        self._index, self._event = index, torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(index))

    def wait(self) -> None:
        """Let the stream in use wait for it."""
        torch.cuda.current_stream(self._index).wait_event(self._event)

    def has_come(self) -> bool:
        """Whether the GPU is past it."""
        return self._event.query()


class CudaDevice:
    """The current GPU, and its symmetric memory with the ranks of a process group."""

    def __init__(self, group_name: str, seats: Sequence[int], rank: int):
        """`seats[r]` is the number in the group of the rank that is called r here."""
        self.index = torch.cuda.current_device()
        self._group_name, self._seats, self._rank = group_name, tuple(seats), rank
        self._side, self._aside = _streams(self.index)
        # As Triton asks, for what torch.cuda.current_stream takes several microseconds.
        stream = functools.partial(torch._C._cuda_getCurrentRawStream, self.index)
        self._words = StreamWords(load_driver(), stream, self.index)

    def allocate(self, size_bytes: int) -> CudaBuffer:
        """A new buffer on every rank.

        Raises:
            CompatibilityError: a CUDA graph is being captured.
        """
        import torch.distributed._symmetric_memory as symm_mem
        from torch._C._distributed_c10d import _SymmetricMemory

        if self.is_capturing():
            raise CompatibilityError(
                f"the ring's shared buffer must grow to {size_bytes} bytes while a CUDA graph is "
                "captured; run the same shapes once before the capture"
            )
        flags_at, flags = flags_begin(size_bytes), first_flags(len(self._seats))
        # Not symm_mem.empty: its pool may reuse a segment on one rank and not on another.
        memory = _SymmetricMemory.empty_strided_p2p(
            (flags_at + flags.nbytes,), (1,), torch.uint8, torch.device("cuda", self.index)
        )
        own = memory[flags_at:].view(torch.int32)
        own.copy_(flags)
        # Also what torch itself zeroes on the current stream, perhaps behind a long kernel: no
        # rank's first word must come before that. Rendezvous lets all ranks get here first.
        torch.cuda.synchronize(self.index)
        handle = symm_mem.rendezvous(memory, self._group_name)
        look = functools.partial(self._copy_out, own, torch.empty_like(flags, pin_memory=True))
        return CudaBuffer(handle, self._seats, self._rank, flags_at, self._words, look)

    @contextmanager
    def side(self) -> Iterator[None]:
        """Issue to the side stream, after what the current stream holds now."""
        self._side.wait_stream(torch.cuda.current_stream(self.index))
        with torch.cuda.stream(self._side):
            yield

    def issue(self, work: Callable[[], object]) -> None:
        """Enqueue to the stream in use."""
        work()

    def mark(self) -> CudaMark:
        """The end of what the stream in use holds."""
        return CudaMark(self.index)

    def is_capturing(self) -> bool:
        """Whether what is enqueued goes into a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def enter_thread(self) -> None:
        """Prepare the thread that calls this: its questions must not spoil another's capture."""
        torch.cuda.set_device(self.index)
        load_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_THREAD_LOCAL)))

    def _copy_out(self, words: Tensor, into: Tensor) -> list[int] | None:
        """Some words as they are now, whatever the other streams wait for; `into` is pinned."""
        with torch.cuda.stream(self._aside):
            into.copy_(words, non_blocking=True)
            mark = self.mark()
        deadline = time.monotonic() + LOOKING_SECONDS
        while not mark.has_come():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.001)
        return into.tolist()


@functools.cache
def _streams(index: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The side stream, and one in which nothing is ever waited for.

    One side stream for all groups: it then has everything in the order of the program.
    """
    return torch.cuda.Stream(device=index, priority=-1), torch.cuda.Stream(device=index)
