"""Who computes what at which ring step, and so which hops are needed.

Every rank holds the same schedule of all ranks, so a sender and its receiver decide alike, without
a message, whether a block still has to travel.
"""

from dataclasses import dataclass

from extend.ring.layouts import EVERYTHING, Block, Layout


@dataclass(frozen=True)
class Schedule:
    """The steps of one call: at step t, rank r meets the keys that started on (r - t) % world."""

    layout: Layout
    rank: int
    world: int
    local_len: int
    causal: bool

    def block(self, step: int) -> Block | None:
        """What this rank computes at `step`."""
        return self._block_of(self.rank, step)

    def source(self, step: int, rank: int | None = None) -> int:
        """The rank on which the keys started that `rank` (default: this one) meets at `step`."""
        return ((self.rank if rank is None else rank) - step) % self.world

    def last_step(self, source: int) -> int:
        """The last step at which any rank has a use for the keys that started on `source`."""
        steps = range(self.world)
        return max(t for t in steps if self._block_of((source + t) % self.world, t) is not None)

    def _block_of(self, rank: int, step: int) -> Block | None:
        if not self.causal:
            return Block(EVERYTHING, EVERYTHING, causal=False)
        return self.layout.block(step, rank, self.world, self.local_len)
