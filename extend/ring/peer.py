"""Fetching out of memory that the GPUs of one host share: the receiver's copy engine pulls.

Each lane has one buffer on every rank, mapped into all of them (symmetric memory), that is kept and
grows when more is published. Ranks wait for each other through flags in that memory, which the
stream itself writes and waits for: no kernel takes part, so that a pull begins and ends while
attention holds every multiprocessor.

    publish   current stream: wait until all have read what was offered before; write; say "written"
    fetch     side stream: wait for the owner's "written"; copy
    close     side stream: tell every owner "read"

Publishing and fetching begin after what the current stream holds at that moment, so that tensors
may be read and memory reused in the usual order; fetches run beside what it gets later. Neither
waits on the host nor takes memory, unless a buffer grows, and flags go back to what they were, so
both can be captured in a CUDA graph once every lane has had its largest size.

Multicast is not used. torch prepares it with each buffer where the hardware has it, unless
TORCH_SYMM_MEM_DISABLE_MULTICAST=1 is set.

The memory of a lane is not that of torch's caching allocator: as much as the largest tensor
published in it, on each rank, until the process group is destroyed.
"""

import ctypes
import functools
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from extend.errors import CompatibilityError
from extend.ring.exchange import exchange
from extend.ring.transfer import Arrival, Request, Transfer

PROBE_BYTES = 4096


class SharedBuffer(Protocol):
    """Memory of the same size on every rank, which all of them can read, and its flags.

    What a method waits for or says is in the order of the stream in use.
    """

    def view(self, owner: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The beginning of what `owner` holds, as this GPU sees it."""
        ...

    def wait_until_read(self) -> None:
        """Wait until every other rank has said `say_read` since this was last waited for."""
        ...

    def say_written(self) -> None:
        """Tell every other rank that it may read."""
        ...

    def wait_until_written(self, owner: int) -> None:
        """Wait until `owner` has said `say_written` since this was last waited for."""
        ...

    def say_read(self, owner: int) -> None:
        """Tell `owner` that it may overwrite what it holds."""
        ...


class SharedDevice(Protocol):
    """All that the transport needs of a GPU, so that its logic can be tested without one."""

    def allocate(self, size_bytes: int) -> SharedBuffer:
        """Collective; the host waits for the other ranks."""
        ...

    def side(self) -> AbstractContextManager[None]:
        """Issue to the side stream, after what the current stream holds now."""
        ...

    def issue(self, work: Callable[[], object]) -> None:
        """Enqueue to the stream in use."""
        ...

    def mark(self) -> Callable[[], None]:
        """The end of what the stream in use holds; calling it lets the then current one wait."""
        ...


class _Lane:
    """The buffer behind one name, and views of the form that was published last."""

    def __init__(self):
        self.size_bytes = 0
        self.buffer: SharedBuffer | None = None
        self.offer: PeerOffer | None = None
        self._form: tuple[torch.Size, torch.dtype] | None = None
        self._views: dict[int, Tensor] = {}

    def hold(self, buffer: SharedBuffer, size_bytes: int) -> None:
        self.buffer, self.size_bytes, self._form = buffer, size_bytes, None

    def take_form(self, shape: torch.Size, dtype: torch.dtype) -> None:
        if self._form != (shape, dtype):
            self._form, self._views = (shape, dtype), {}

    def view(self, owner: int) -> Tensor:
        if owner not in self._views:
            self._views[owner] = self.buffer.view(owner, *self._form)
        return self._views[owner]


class PeerBuffers:
    """The lanes of ranks whose GPUs reach each other's memory."""

    def __init__(self, device: SharedDevice, rank: int, world: int):
        """Hold nothing yet; `rank` is this process's among those of the `device`'s buffers."""
        self._device, self._rank, self._world = device, rank, world
        self._lanes: dict[str, _Lane] = {}

    def publish(
        self, name: str, shape: torch.Size, like: Tensor, write: Callable[[Tensor], object]
    ) -> "PeerOffer":
        """Offer a tensor of `shape` like `like`, which `write(buffer)` fills.

        All ranks publish the same shapes in the same order, so that buffers grow together.
        """
        lane = self._lanes.setdefault(name, _Lane())
        if lane.offer is not None:
            lane.offer.close()
        needed = math.prod(shape) * like.dtype.itemsize
        if lane.size_bytes < needed:
            # The old buffer goes after the new one has come, when nobody can still want it.
            lane.hold(self._device.allocate(needed), needed)
        lane.take_form(shape, like.dtype)
        lane.buffer.wait_until_read()
        self._device.issue(functools.partial(write, lane.view(self._rank)))
        lane.buffer.say_written()
        others = [owner for owner in range(self._world) if owner != self._rank]
        lane.offer = PeerOffer(self._device, lane, others)
        return lane.offer


class PeerOffer:
    """What was published last in a lane, and how to copy out of it."""

    def __init__(self, device: SharedDevice, lane: _Lane, others: Sequence[int]):
        """`others` are the ranks that have offered something as well."""
        self._device, self._lane, self._others = device, lane, tuple(others)
        self._awaited: set[int] = set()
        self._closed = False

    def view(self, owner: int) -> Tensor:
        """What `owner` has published."""
        return self._lane.view(owner)

    def fetch(self, requests: Sequence[Request], arrivals: Sequence[Arrival]) -> Transfer:
        """Copy what arrives; every rank's own fetches do, nobody sends."""
        if not arrivals:
            return Transfer()
        with self._device.side():
            for owner, into, source in arrivals:
                self._await(owner)
                self._device.issue(functools.partial(into.copy_, source, non_blocking=True))
            done = self._device.mark()
        return Transfer(done, arrivals)

    def close(self) -> None:
        """Nothing more will be fetched: give the owners their buffers back."""
        if self._closed:
            return
        self._closed = True
        with self._device.side():
            for owner in self._others:
                self._await(owner)
                self._lane.buffer.say_read(owner)

    def _await(self, owner: int) -> None:
        if owner in self._others and owner not in self._awaited:
            self._awaited.add(owner)
            self._lane.buffer.wait_until_written(owner)


class CudaDevice:
    """The current GPU, and its symmetric memory with the ranks of a process group."""

    def __init__(self, group_name: str, seats: Sequence[int], rank: int):
        """`seats[r]` is the number in the group of the rank that is called r here."""
        self.index = torch.cuda.current_device()
        self._group_name, self._seats, self._rank = group_name, tuple(seats), rank
        self._stream = _side_stream(self.index)

    def allocate(self, size_bytes: int) -> "CudaBuffer":
        """A new buffer on every rank.

        Raises:
            CompatibilityError: a CUDA graph is being captured.
        """
        import torch.distributed._symmetric_memory as symm_mem
        from torch._C._distributed_c10d import _SymmetricMemory

        if torch.cuda.is_current_stream_capturing():
            raise CompatibilityError(
                f"the ring's shared buffer must grow to {size_bytes} bytes while a CUDA graph is "
                "captured; run the same shapes once before the capture"
            )
        flags_at = -(-size_bytes // 256) * 256
        # Not symm_mem.empty: its pool may reuse a segment on one rank and not on another.
        memory = _SymmetricMemory.empty_strided_p2p(
            (flags_at + 8 * len(self._seats),), (1,), torch.uint8,
            torch.device("cuda", self.index),
        )  # fmt: skip
        _first_flags(memory, flags_at).copy_(torch.tensor([0, 1]).repeat_interleave(len(self._seats)))
        # Also what torch itself zeroes on the current stream, perhaps behind a long kernel: nobody's
        # first word must come before that. Rendezvous lets all ranks get here first.
        torch.cuda.synchronize(self.index)
        handle = symm_mem.rendezvous(memory, self._group_name)
        return CudaBuffer(memory, handle, self._seats, self._rank, flags_at)

    @contextmanager
    def side(self) -> Iterator[None]:
        """Issue to the side stream, after what the current stream holds now."""
        self._stream.wait_stream(torch.cuda.current_stream(self.index))
        with torch.cuda.stream(self._stream):
            yield

    def issue(self, work: Callable[[], object]) -> None:
        """Enqueue to the stream in use."""
        work()

    def mark(self) -> Callable[[], None]:
        """The end of what the stream in use holds."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.index))
        return lambda: torch.cuda.current_stream(self.index).wait_event(event)


def _first_flags(memory: Tensor, flags_at: int) -> Tensor:
    """The flags behind the data, int32: "written" of every rank, then "read"."""
    return memory[flags_at:].view(torch.int32)


class CudaBuffer:
    """Symmetric memory of torch, with flags that streams write and wait for."""

    def __init__(
        self, memory: Tensor, handle: Any, seats: tuple[int, ...], rank: int, flags_at: int
    ):
        """`memory` is this rank's own part, `handle` the way to all, `flags_at` in bytes."""
        self._memory, self._handle, self._seats, self._rank = memory, handle, seats, rank
        starts = [handle.buffer_ptrs[seat] + flags_at for seat in seats]
        world = len(seats)
        self._others = [r for r in range(world) if r != rank]
        # Of each rank's flags: those that are about this rank. Of this rank's: those about others.
        self._their_written = [start + 4 * rank for start in starts]
        self._their_read = [start + 4 * (world + rank) for start in starts]
        self._written = [starts[rank] + 4 * r for r in range(world)]
        self._read = [starts[rank] + 4 * (world + r) for r in range(world)]

    def view(self, owner: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The beginning of what `owner` holds."""
        return self._handle.get_buffer(self._seats[owner], tuple(shape), dtype)

    def wait_until_read(self) -> None:
        """Wait for every other rank's `say_read`."""
        for rank in self._others:
            _take(self._read[rank])

    def say_written(self) -> None:
        """Tell every other rank that it may read."""
        for rank in self._others:
            _set(self._their_written[rank], 1)

    def wait_until_written(self, owner: int) -> None:
        """Wait for `owner`'s `say_written`."""
        _take(self._written[owner])

    def say_read(self, owner: int) -> None:
        """Tell `owner` that it may overwrite what it holds."""
        _set(self._their_read[owner], 1)


def _set(address: int, value: int) -> None:
    """Let the current stream write a flag, after all that it holds, visible to every GPU."""
    stream = torch.cuda.current_stream().cuda_stream
    _check(_driver().cuStreamWriteValue32_v2(stream, address, value, 0), "write")


def _take(address: int) -> None:
    """Let the current stream wait until a flag is 1, and set it back to 0."""
    stream = torch.cuda.current_stream().cuda_stream
    _check(_driver().cuStreamWaitValue32_v2(stream, address, 1, _EQUAL), "wait for")
    _set(address, 0)


_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver cannot {what} a flag from a stream (error {status})")


@functools.cache
def _driver() -> ctypes.CDLL:
    """The CUDA driver's memory operations of streams (CUDA driver API, section 6.18)."""
    driver = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        arguments = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        getattr(driver, name).argtypes = arguments
    return driver


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One for all groups: their barriers then come in the order in which the program has them."""
    return torch.cuda.Stream(device=index, priority=-1)


class Facts(NamedTuple):
    """Where a rank runs and which GPUs it reaches; the latter are empty without GPUs."""

    host: str
    gpu: str = ""
    visible: Sequence[str] = ()
    reachable: Sequence[str] = ()
    problem: str = ""


def find_facts(on_gpus: bool) -> Facts:
    """Those of this process."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # two containers may have one name
    host = f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"
    if not on_gpus:
        return Facts(host)
    mine = torch.cuda.current_device()
    indices = range(torch.cuda.device_count())
    names = [str(torch.cuda.get_device_properties(i).uuid) for i in indices]
    reachable = [
        names[i] for i in indices if i == mine or torch.cuda.can_device_access_peer(mine, i)
    ]
    return Facts(host, names[mine], names, reachable)


def refusal(facts: Mapping[int, Facts]) -> str | None:
    """Why these ranks' GPUs cannot share memory, where that is known beforehand."""
    hosts = {fact.host for fact in facts.values()}
    if len(hosts) > 1:
        names = ", ".join(sorted({host.split()[0] for host in hosts}))
        return f"the ranks run on {len(hosts)} hosts ({names})"
    for rank, fact in facts.items():
        for other, its in facts.items():
            if its.gpu in fact.visible and its.gpu not in fact.reachable:
                return f"the GPU of rank {rank} does not reach the memory of that of rank {other}"
    return None


def open_peers(
    group_name: Callable[[], str], ranks: tuple[int, ...], order: tuple[int, ...], rank: int,
    timeout: timedelta,
) -> tuple[PeerBuffers | None, str]:  # fmt: skip
    """The transport between `ranks` and why, or (None, why not), which all of them then get.

    Args:
        group_name: gives the name of a process group of these ranks.
        ranks, rank: of the default group, in the order of the comm; this one's number there.
        order: the same ranks in the order of that process group.
    """
    device = buffer = None
    problem = ""
    try:
        device = CudaDevice(group_name(), [order.index(r) for r in ranks], rank)
        buffer = device.allocate(PROBE_BYTES)
    except (RuntimeError, ImportError, AttributeError) as error:
        problem = f"no symmetric memory ({str(error).splitlines()[0]})"
    # A rank that failed would never say the word that the others would wait for.
    for check in (lambda: problem, lambda: probe(buffer, rank, len(ranks))):
        said = exchange(ranks, check(), what="RingComm", timeout=timeout)
        for other, complaint in zip(ranks, said):
            if complaint:
                return None, f"rank {other}: {complaint}"
    return PeerBuffers(device, rank, len(ranks)), "all GPUs are in one host and read each other's memory"


def probe(buffer: SharedBuffer, rank: int, world: int) -> str:
    """Read a number that each rank wrote; return what is wrong, or nothing."""
    form = (torch.Size((1,)), torch.int32)
    others = [r for r in range(world) if r != rank]
    try:
        buffer.wait_until_read()
        buffer.view(rank, *form).fill_(rank + 1)
        buffer.say_written()
        for owner in others:
            buffer.wait_until_written(owner)
        found = [buffer.view(owner, *form).item() for owner in range(world)]
        for owner in others:
            buffer.say_read(owner)
    except (RuntimeError, OSError, AttributeError) as error:
        return str(error)
    wanted = list(range(1, world + 1))
    return "" if found == wanted else f"reads {found} where the ranks wrote {wanted}"
