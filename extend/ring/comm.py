"""What travels around the ring: keys and values forwards, their gradients behind them.

A hop is posted before the block it does not depend on is computed, and waited for after it. Every
rank posts the hops of a step in the same order (keys and values, then gradients), so NCCL cannot
deadlock, and no hop is made that nobody has a use for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from extend.ring.layouts import Block
from extend.ring.schedule import Schedule

Parcel = tuple[Tensor, int]  # what, and the rank in the group that it goes to or comes from


@dataclass(frozen=True)
class Transfer:
    """Sends and receives under way."""

    works: Sequence[Work] = ()

    def wait(self) -> None:
        """Return when what was received may be read and what was sent may be overwritten.

        On CUDA it is the current stream that waits.
        """
        for work in self.works:
            work.wait()


class RingComm:
    """Point-to-point messages inside one process group."""

    def __init__(self, group: ProcessGroup | None = None):
        """Use `group`; None is the default group, or one lone process where none was set up."""
        self.group = group
        ready = dist.is_initialized()
        self.rank = dist.get_rank(group) if ready else 0
        self.world = dist.get_world_size(group) if ready else 1
        if self.rank < 0:
            raise ValueError("this process is not in the group; only its members call the ring")

    @classmethod
    def alone(cls) -> "RingComm":
        """A ring of one, whatever process groups there are."""
        comm = cls.__new__(cls)
        comm.group, comm.rank, comm.world = None, 0, 1
        return comm

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        """Start all `sends` and `receives` as one batch and return without waiting."""
        ops = [dist.P2POp(dist.isend, t, group=self.group, group_peer=to) for t, to in sends]
        ops += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=of) for t, of in receives]
        return Transfer(dist.batch_isend_irecv(ops)) if ops else Transfer()


def circulate(
    comm: RingComm, schedule: Schedule, k: Tensor, v: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield `(step, k, v)` for every step, [b, h_kv, s, d] each.

    While the caller computes on what was yielded, the next keys and values are on their way in one
    buffer; two such buffers are all that is ever held. What is yielded is valid for its own step
    only, and holds nothing at a step without a block.
    """
    if comm.world == 1:
        yield 0, k, v
        return
    held = torch.stack((k, v))
    spare = torch.empty_like(held)
    onward, behind = (comm.rank + 1) % comm.world, (comm.rank - 1) % comm.world
    for step in range(comm.world):
        ours, theirs = schedule.source(step), schedule.source(step, behind)
        transfer = comm.post(
            sends=[(held, onward)] if step < schedule.last_step(ours) else [],
            receives=[(spare, behind)] if step < schedule.last_step(theirs) else [],
        )
        yield step, held[0], held[1]
        transfer.wait()
        held, spare = spare, held


class GradientHops:
    """Collects dK and dV: every rank adds its share to a sum that follows the keys.

    Sums are fp32 [2, b, h_kv, s, d], dK then dV. The share of step 0 stays at home; the others
    start at step 1 and go home directly from the last rank that had a use for the keys.
    """

    def __init__(self, comm: RingComm, schedule: Schedule, k: Tensor):
        self._comm, self._schedule = comm, schedule
        dtype = torch.promote_types(k.dtype, torch.float32)
        self._home = torch.zeros((2, *k.shape), dtype=dtype, device=k.device)
        self._held = torch.zeros_like(self._home)  # the sum that this rank adds to next
        self._spare = torch.empty_like(self._home)  # where the one after it arrives
        self._returned: Tensor | None = None
        self._transfer = Transfer()

    def add(self, step: int, block: Block | None, dk: Tensor | None, dv: Tensor | None) -> None:
        """Add what this rank found at `step`, if it had a block, and pass the sum on.

        The hop is under way when this returns; it is waited for at the next step, after the next
        block has been computed.
        """
        self._transfer.wait()
        if step > 1:
            self._held, self._spare = self._spare, self._held
        sums = self._home if step == 0 else self._held
        if block is not None:
            sums[0, :, :, block.kv] += dk
            sums[1, :, :, block.kv] += dv
        if step > 0:
            self._transfer = self._pass_on(step)

    def finish(self) -> tuple[Tensor, Tensor]:
        """dK and dV of this rank's own keys and values, in fp32."""
        self._transfer.wait()
        if self._returned is not None:
            self._home += self._returned
        return self._home[0], self._home[1]

    def _pass_on(self, step: int) -> Transfer:
        rank, world, last_step = self._comm.rank, self._comm.world, self._schedule.last_step
        onward, behind = (rank + 1) % world, (rank - 1) % world
        ours, theirs = self._schedule.source(step), self._schedule.source(step, behind)
        sends, receives = [], []
        if step <= last_step(ours):
            sends.append((self._held, onward if step < last_step(ours) else ours))
        if step < last_step(theirs):
            receives.append((self._spare, behind))
        if step == last_step(rank):
            self._returned = torch.empty_like(self._home)
            receives.append((self._returned, (rank + step) % world))
        return self._comm.post(sends, receives)
