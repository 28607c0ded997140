"""Fetching out of memory that the GPUs of one host share: the receiver's copy engine pulls.

Each lane has one buffer on every rank, mapped into all of them (symmetric memory), that is kept and
grows when more is published. Ranks wait for each other through flags in that memory, which the
stream itself writes and waits for: no kernel takes part, so that a pull begins and ends while
attention holds every multiprocessor.

    publish   current stream: wait until all have read what was offered before; write; say "written"
    fetch     side stream: wait for the owner's "written"; copy
    close     side stream: tell every owner "read", once it has written

Publishing and fetching begin after what the current stream holds at that moment, so that tensors
may be read and memory reused in the usual order; fetches run beside what it gets later. Neither
waits on the host nor takes memory, unless a buffer grows, and flags go back to what they were, so
both can be captured in a CUDA graph once every lane has had its largest size.

A stream waits only for what ranks enqueue earlier in the program that they share. Of all that is
not done, what comes first in the program can therefore be done, however the streams of a GPU share
its queues: nothing blocks for ever, unless a rank stops. `extend.ring.watchdog` is told of every
wait, except in a CUDA graph, and ends a process that waits for too long.

Multicast is not used. torch prepares it with each buffer where the hardware has it, unless
TORCH_SYMM_MEM_DISABLE_MULTICAST=1 is set.

The memory of a lane is not that of torch's caching allocator: as much as the largest tensor
published in it, on each rank, until the process group is destroyed.
"""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from extend.ring.peer_cuda import Flags
from extend.ring.transfer import Arrival, Request, Transfer
from extend.ring.watchdog import Awaited, Watchdog


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
        """Wait until `owner` has said `say_written` since this rank's last `say_read` to it."""
        ...

    def say_read(self, owner: int) -> None:
        """Tell `owner`, whose `say_written` has come, that it may overwrite what it holds."""
        ...

    def look(self) -> Flags | None:
        """What was said to this rank and not yet used, now; None if that cannot be found out."""
        ...


class Mark(Protocol):
    """The end of what a stream held at some time."""

    def wait(self) -> None:
        """Let the stream in use wait for it."""
        ...

    def has_come(self) -> bool:
        """Whether the GPU is past it."""
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

    def mark(self) -> Mark:
        """The end of what the stream in use holds."""
        ...

    def is_capturing(self) -> bool:
        """Whether what is enqueued goes into a CUDA graph."""
        ...


class _Form:
    """A lane's buffer on every rank, as tensors of one shape."""

    def __init__(self, buffer: SharedBuffer, shape: torch.Size, dtype: torch.dtype):
        self.buffer, self.shape, self.dtype = buffer, shape, dtype
        self._views: dict[int, Tensor] = {}

    def view(self, owner: int) -> Tensor:
        if owner not in self._views:
            self._views[owner] = self.buffer.view(owner, self.shape, self.dtype)
        return self._views[owner]


class _Lane:
    """What is behind one name."""

    def __init__(self):
        self.size_bytes = 0
        self.form: _Form | None = None
        self.offer: PeerOffer | None = None


class _Reporter:
    """Tells the watchdog what this rank waits for in one lane."""

    def __init__(
        self, watchdog: Watchdog, ranks: tuple[int, ...], rank: int, lane: str, timeout: timedelta
    ):
        self._watchdog, self._ranks, self._rank = watchdog, ranks, rank
        self._lane, self._timeout = lane, timeout

    def tell(self, mark: Mark, buffer: SharedBuffer, owners: Sequence[int], *, read: bool) -> None:
        """The stream comes past `mark` when all `owners` have written, or read."""
        what = f"read what was published before in lane {self._lane!r}"
        if not read:
            what = f"publish in lane {self._lane!r}"
        # The buffer must not live longer for this: to free it, torch waits for the GPU.
        missing = functools.partial(self._missing, weakref.ref(buffer), tuple(owners), read)
        self._watchdog.watch(Awaited(
            self._ranks[self._rank], what, self._timeout.total_seconds(), mark.has_come, missing,
        ))  # fmt: skip

    def _missing(
        self, buffer: weakref.ref[SharedBuffer], owners: tuple[int, ...], read: bool
    ) -> list[int] | None:
        held = buffer()
        flags = held.look() if held is not None else None
        if flags is None:
            return None
        said = flags.read if read else flags.written
        return [self._ranks[owner] for owner in owners if not said[owner]]


class PeerBuffers:
    """The lanes of ranks whose GPUs reach each other's memory."""

    def __init__(
        self, device: SharedDevice, rank: int, ranks: tuple[int, ...], watchdog: Watchdog
    ):
        """Hold nothing yet.

        Args:
            rank: this process's place among those of the `device`'s buffers.
            ranks: their numbers in the default group, for messages.
            watchdog: is told of everything that a stream waits for.
        """
        self._device, self._rank, self._ranks, self._watchdog = device, rank, ranks, watchdog
        self._others = [owner for owner in range(len(ranks)) if owner != rank]
        self._lanes: dict[str, _Lane] = {}

    def publish(
        self, name: str, shape: torch.Size, like: Tensor, write: Callable[[Tensor], object],
        timeout: timedelta,
    ) -> "PeerOffer":  # fmt: skip
        """Offer a tensor of `shape` like `like`, which `write(buffer)` fills.

        All ranks publish the same shapes in the same order, so that buffers grow together. No rank
        may keep another waiting for longer than `timeout`.
        """
        lane = self._lanes.setdefault(name, _Lane())
        if lane.offer is not None:
            lane.offer.close()
            lane.offer.let_go()
        form = self._form(lane, shape, like.dtype)
        reporter = _Reporter(self._watchdog, self._ranks, self._rank, name, timeout)
        if self._others:
            form.buffer.wait_until_read()
            if not self._device.is_capturing():
                reporter.tell(self._device.mark(), form.buffer, self._others, read=True)
        self._device.issue(functools.partial(write, form.view(self._rank)))
        form.buffer.say_written()
        lane.offer = PeerOffer(self._device, form, self._others, reporter)
        return lane.offer

    def _form(self, lane: _Lane, shape: torch.Size, dtype: torch.dtype) -> _Form:
        needed = math.prod(shape) * dtype.itemsize
        if lane.size_bytes < needed:
            # The old buffer goes after the new one has come, when nobody can still want it.
            lane.form = _Form(self._device.allocate(needed), shape, dtype)
            lane.size_bytes = needed
        elif (lane.form.shape, lane.form.dtype) != (shape, dtype):
            lane.form = _Form(lane.form.buffer, shape, dtype)
        return lane.form


class PeerOffer:
    """What was published last in a lane, and how to copy out of it."""

    def __init__(
        self, device: SharedDevice, form: _Form, others: Sequence[int], reporter: _Reporter
    ):
        """`others` are the ranks that have offered something as well."""
        self._device, self._form, self._reporter = device, form, reporter
        self._others = tuple(others)
        self._awaited: set[int] = set()
        self._closed = False
        self._own: list[Mark] = []  # copies of what this rank itself published, under way
        self._last: Mark | None = None  # of the fetch posted last, while under way
        self._end: Mark | None = None  # of closing, where the current stream must come by it

    def view(self, owner: int) -> Tensor:
        """What `owner` has published."""
        return self._form.view(owner)

    def fetch(self, requests: Sequence[Request], arrivals: Sequence[Arrival]) -> Transfer:
        """Copy what arrives; every rank's own fetches do, nobody sends."""
        if not arrivals:
            return Transfer()
        with self._device.side():
            for owner, into, source in arrivals:
                self._await(owner)
                self._device.issue(functools.partial(into.copy_, source, non_blocking=True))
            done = self._last = self._device.mark()
        owners = {arrival.owner for arrival in arrivals}
        if not owners.issubset(self._others):
            self._own.append(done)
        awaited = sorted(owners.intersection(self._others))
        if awaited and not self._device.is_capturing():
            self._reporter.tell(done, self._form.buffer, awaited, read=False)
        return Transfer(functools.partial(self._finish, done), arrivals)

    def close(self) -> None:
        """Nothing more will be fetched: give the owners their buffers back."""
        if self._closed:
            return
        self._closed = True
        late = [owner for owner in self._others if owner not in self._awaited]
        capturing = self._device.is_capturing()
        with self._device.side():
            for owner in sorted(self._awaited):
                self._form.buffer.say_read(owner)
            for owner in late:
                self._await(owner)
            for owner in late:  # after the waits, so that `look` tells whose word has not come
                self._form.buffer.say_read(owner)
            end = self._device.mark() if late or capturing else None
        if capturing:
            self._join(end)
        elif late:
            self._reporter.tell(end, self._form.buffer, late, read=False)

    def let_go(self) -> None:
        """Let the current stream wait for what this rank does not wait for by a flag: itself."""
        for mark in (*self._own, self._end):
            if mark is not None:
                mark.wait()

    def _await(self, owner: int) -> None:
        if owner in self._others and owner not in self._awaited:
            self._awaited.add(owner)
            self._form.buffer.wait_until_written(owner)

    def _join(self, end: Mark) -> None:
        """A graph must not end before the side stream: the last to wait for it waits for all."""
        if self._last is None:
            end.wait()
        else:
            self._end = end

    def _finish(self, done: Mark) -> None:
        """Let the current stream wait for a fetch."""
        if done in self._own:
            self._own.remove(done)
        end = None
        if done is self._last:
            end, self._last, self._end = self._end, None, None
        (end or done).wait()
