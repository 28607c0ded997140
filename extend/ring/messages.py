"""Fetching by messages: the owner sends, the receiver receives, both without being told to."""

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, Work

from extend.errors import RankError
from extend.ring.exchange import name_ranks
from extend.ring.transfer import Arrival, Request, Transfer

AT_ONCE = timedelta(milliseconds=1)  # zero would mean the default time-out


class Messages:
    """One rank's published tensor, and what it takes to send it and to receive the others'."""

    def __init__(
        self, group: ProcessGroup | None, places: tuple[int, ...], ranks: tuple[int, ...],
        rank: int, lane: str, tensor: Tensor, timeout: timedelta,
    ):  # fmt: skip
        """`places` are the ranks of `group` to talk to, `ranks` the same in the default group."""
        self._group, self._places, self._ranks = group, places, ranks
        self._rank, self._lane, self._tensor, self._timeout = rank, lane, tensor, timeout

    def view(self, owner: int) -> Tensor:
        """A buffer like the one of `owner`; its contents are known to `owner` only."""
        return self._tensor

    def fetch(self, requests: Sequence[Request], arrivals: Sequence[Arrival]) -> Transfer:
        """Post all sends and receives as one batch."""
        batch = _Batch(self._describe(requests), self._ranks[self._rank], self._timeout)
        for step, _, select in requests:
            to = (self._rank + step) % len(self._places)
            leaving = select(self._tensor, to) if step else None
            if leaving is not None and leaving.numel():
                batch.add(self._op(dist.isend, leaving.contiguous(), to), self._ranks[to])
        for owner, into, source in arrivals:
            if owner == self._rank:
                into.copy_(source)
                continue
            batch.add(self._op(dist.irecv, batch.room_for(into), owner), self._ranks[owner])
        batch.post()
        return Transfer(batch.wait, batch)

    def close(self) -> None:
        """A message leaves nothing behind."""

    def _op(self, kind, tensor: Tensor, peer: int) -> P2POp:
        return P2POp(kind, tensor, group=self._group, group_peer=self._places[peer])

    def _describe(self, requests: Sequence[Request]) -> str:
        steps = sorted({request.step for request in requests})
        plural = "s" if len(steps) > 1 else ""
        return f"{self._lane!r}, step{plural} {', '.join(map(str, steps))}"


class _Batch:
    """Sends and receives that were posted together."""

    def __init__(self, what: str, rank: int, timeout: timedelta):
        self._what, self._rank, self._timeout = what, rank, timeout
        self._ops: list[P2POp] = []
        self._peers: list[int] = []
        self._works: list[Work] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def room_for(self, into: Tensor) -> Tensor:
        """`into`, or contiguous memory that is copied there in the end."""
        if into.is_contiguous():
            return into
        room = torch.empty_like(into, memory_format=torch.contiguous_format)
        self._copies.append((into, room))
        return room

    def add(self, op: P2POp, peer: int) -> None:
        self._ops.append(op)
        self._peers.append(peer)

    def post(self) -> None:
        """Start everything; on the CPU one by one, so that a peer that is gone has a name."""
        if self._ops and self._ops[0].tensor.is_cuda:
            self._works = dist.batch_isend_irecv(self._ops)
            return
        gone, cause = [], None
        for op, peer in zip(self._ops, self._peers, strict=True):
            try:
                self._works += dist.batch_isend_irecv([op])
            except RuntimeError as error:  # what the others wait for leaves all the same
                gone, cause = [*gone, peer], cause or error
        if cause is not None:
            raise self._explain(sorted(set(gone)), 0.0, cause) from cause

    def wait(self) -> None:
        """Wait for everything, on a GPU in the current stream."""
        if self._ops and self._ops[0].tensor.is_cuda:
            for work in self._works:
                work.wait()
        else:
            self._wait_on_host()
        for into, room in self._copies:
            into.copy_(room)

    def _wait_on_host(self) -> None:
        begin, silent, cause = time.monotonic(), [], None
        for work, peer in zip(self._works, self._peers, strict=True):
            waited = timedelta(seconds=time.monotonic() - begin)
            try:
                work.wait(max(self._timeout - waited, AT_ONCE))
            except RuntimeError as error:
                silent, cause = [*silent, peer], cause or error
                if timedelta(seconds=time.monotonic() - begin) < self._timeout:
                    break  # a lost connection: the others may yet have time
        if cause is not None:
            seconds = time.monotonic() - begin
            raise self._explain(sorted(set(silent)), seconds, cause) from cause

    def _explain(self, silent: list[int], seconds: float, cause: RuntimeError) -> RankError:
        return RankError(
            f"rank {self._rank} has not heard from {name_ranks(silent)} after {seconds:.1f} s, "
            f"fetching {self._what}; it died, hangs, or is slower than the time-out of "
            f"{self._timeout.total_seconds():g} s: look for the first error in its log, or raise "
            f"the time-out (timeout= of init_process_group). {str(cause).splitlines()[0]}"
        )
