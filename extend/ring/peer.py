"""Fetching out of memory that the GPUs of one host share: the receiver's copy engine pulls.

Each lane has one buffer on every rank, mapped into all of them (symmetric memory), that is kept and
grows when more is published. Everything happens on one side stream of high priority:

    publish   [barrier] [write] [barrier]      the first: all have read what was offered before;
                                               the second: all have written what is offered now
    fetch     [copy] [copy] ...                of what peers hold, into this rank's own tensors
    wait      the current stream waits for the last copy

Publishing and fetching begin after what the current stream holds at that moment, so that tensors
may be read and memory reused in the usual order; they run beside what it gets later. Neither waits
on the host nor takes memory, unless a buffer grows, so both can be captured in a CUDA graph once
every lane has had its largest size. Multicast is not used.

The memory of a lane is not that of torch's caching allocator: as much as the largest tensor
published in it, on each rank, until the process group is destroyed.
"""

import functools
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from extend.errors import CompatibilityError
from extend.ring.exchange import exchange
from extend.ring.transfer import Arrival, Request, Transfer

PROBE_BYTES = 4096


class SharedBuffer(Protocol):
    """Memory of the same size on every rank, which all of them can read."""

    def view(self, owner: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The beginning of what `owner` holds, as this GPU sees it."""
        ...

    def barrier(self, channel: int, timeout: timedelta) -> None:
        """Let the current stream wait until every rank's has come to this point."""
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

    def __init__(self, channel: int):
        self.channel, self.size_bytes = channel, 0
        self.buffer: SharedBuffer | None = None
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

    def __init__(self, device: SharedDevice, rank: int):
        """Hold nothing yet; `rank` is this process's among those of the `device`'s buffers."""
        self._device, self._rank = device, rank
        self._lanes: dict[str, _Lane] = {}

    def publish(
        self, name: str, shape: torch.Size, like: Tensor, write: Callable[[Tensor], object],
        timeout: timedelta,
    ) -> "PeerOffer":  # fmt: skip
        """Offer a tensor of `shape` like `like`, which `write(buffer)` fills on the side stream.

        All ranks publish the same shapes in the same order, so that buffers grow together.
        """
        # A channel of its own: barriers of two lanes must not be taken for one another.
        lane = self._lanes.setdefault(name, _Lane(channel=len(self._lanes)))
        needed = math.prod(shape) * like.dtype.itemsize
        if lane.size_bytes < needed:
            # The old buffer goes after the new one has come, when nobody can still want it.
            lane.hold(self._device.allocate(needed), needed)
        lane.take_form(shape, like.dtype)
        with self._device.side():
            lane.buffer.barrier(lane.channel, timeout)
            self._device.issue(functools.partial(write, lane.view(self._rank)))
            lane.buffer.barrier(lane.channel, timeout)
            ready = self._device.mark()
        return PeerOffer(self._device, lane, ready, write)


class PeerOffer:
    """What was published last in a lane, and how to copy out of it."""

    def __init__(
        self, device: SharedDevice, lane: _Lane, ready: Callable[[], None],
        write: Callable[[Tensor], object],
    ):  # fmt: skip
        """`ready` marks when every rank's is there; `write` keeps what it reads alive."""
        self._device, self._lane, self._ready, self._write = device, lane, ready, write

    def view(self, owner: int) -> Tensor:
        """What `owner` has published."""
        return self._lane.view(owner)

    def fetch(self, requests: Sequence[Request], arrivals: Sequence[Arrival]) -> Transfer:
        """Copy what arrives; every rank's own fetches do, nobody sends."""
        if not arrivals:  # what this rank has published must still have been written
            return Transfer(self._ready, self._write)
        with self._device.side():
            for _, into, source in arrivals:
                self._device.issue(functools.partial(into.copy_, source, non_blocking=True))
            done = self._device.mark()
        return Transfer(done, (self._write, arrivals))


class CudaDevice:
    """The current GPU, and its symmetric memory with the ranks of a process group."""

    def __init__(self, group_name: str, seats: Sequence[int]):
        """`seats[r]` is the number in the group of the rank that is called r here."""
        self.index = torch.cuda.current_device()
        self._group_name, self._seats = group_name, tuple(seats)
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
        # Not symm_mem.empty: its pool may reuse a segment on one rank and not on another.
        memory = _SymmetricMemory.empty_strided_p2p(
            (size_bytes,), (1,), torch.uint8, torch.device("cuda", self.index)
        )
        handle = symm_mem.rendezvous(memory, self._group_name)
        return CudaBuffer(memory, handle, self._seats)

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


class CudaBuffer:
    """Symmetric memory of torch."""

    def __init__(self, memory: Tensor, handle, seats: tuple[int, ...]):
        """`memory` is this rank's own part, `handle` the way to all."""
        self._memory, self._handle, self._seats = memory, handle, seats

    def view(self, owner: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The beginning of what `owner` holds."""
        return self._handle.get_buffer(self._seats[owner], tuple(shape), dtype)

    def barrier(self, channel: int, timeout: timedelta) -> None:
        """A kernel of one warp that waits for the others; past the time-out it aborts."""
        self._handle.barrier(channel=channel, timeout_ms=int(timeout.total_seconds() * 1000))


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
        device = CudaDevice(group_name(), [order.index(r) for r in ranks])
        buffer = device.allocate(PROBE_BYTES)
    except (RuntimeError, ImportError, AttributeError) as error:
        problem = f"no symmetric memory ({str(error).splitlines()[0]})"
    # A rank that failed would never come to the barrier in which the others would wait for it.
    for check in (lambda: problem, lambda: probe(buffer, rank, len(ranks), timeout)):
        said = exchange(ranks, check(), what="RingComm", timeout=timeout)
        for other, complaint in zip(ranks, said):
            if complaint:
                return None, f"rank {other}: {complaint}"
    return PeerBuffers(device, rank), "all GPUs are in one host and read each other's memory"


def probe(buffer: SharedBuffer, rank: int, world: int, timeout: timedelta) -> str:
    """Read a number that each rank wrote; return what is wrong, or nothing."""
    form = (torch.Size((1,)), torch.int32)
    buffer.view(rank, *form).fill_(rank + 1)
    buffer.barrier(0, timeout)
    found = [buffer.view(owner, *form).item() for owner in range(world)]
    buffer.barrier(0, timeout)
    wanted = list(range(1, world + 1))
    return "" if found == wanted else f"reads {found} where the ranks wrote {wanted}"
