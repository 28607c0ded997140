"""One pass of attention, forward or backward, under each strategy: seconds and bytes of one rank.

The assumptions are written down in cost.py, which adds the passes up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from extend.ring.cost.hardware import Hardware, Link
from extend.ring.cost.workload import Call, Plan, Work, gathered, kernel_seconds, plans, whole
from extend.ring.strategies.ulysses import num_groups


@dataclass(frozen=True)
class Implementation:
    """How a ring is written, where that changes what is moved or what can hide it.

    Attributes:
        transport: inside a host: "peer" (copy engines pull) or "nccl" (send and receive).
        merge_bytes: memory traffic for each value of a partial out that is merged in fp32.
        gradient_merge_bytes: the same for a partial dq, dk or dv.
        share_bytes: bytes a value of dK and dV on the wire.
        exchange_bytes: memory traffic for each value that Ulysses packs and unpacks.
        is_frugal: two partial results, no more, are joined without fp32 copies, and half of a
            rank's own block is left for the end of the backward pass.
        gathered_bytes: keys that all-gather holds for one group of heads.
        hides_exchange: Ulysses exchanges one group of heads while it computes another.
    """

    transport: str = "peer"
    merge_bytes: float = 10  # fp32 read and written, bf16 read
    gradient_merge_bytes: float = 10
    share_bytes: float = 2
    exchange_bytes: float = 4  # into the buffer that others pull from
    is_frugal: bool = True
    gathered_bytes: float = 2 << 30
    hides_exchange: bool = True


OURS = Implementation()


@dataclass(frozen=True)
class Cost:
    """Seconds and received bytes of one pass, or of two, on one rank."""

    compute: float = 0.0
    merge: float = 0.0
    exposed: float = 0.0
    intra: float = 0.0
    inter: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.merge + self.exposed

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.compute + other.compute, self.merge + other.merge, self.exposed + other.exposed,
            self.intra + other.intra, self.inter + other.inter,
        )  # fmt: skip


class Pass(NamedTuple):
    """What the formulas of a pass, forward or backward, have in common."""

    hardware: Hardware
    how: Implementation
    backward: bool

    @property
    def link(self) -> Link:
        """The way inside a host."""
        return self.hardware.pull if self.how.transport == "peer" else self.hardware.nccl

    def kernel(self, call: Call, work: Work) -> float:
        """Time of one kernel call."""
        return kernel_seconds(call, work, self.hardware, self.backward)

    def own(self, call: Call, plan: Plan) -> tuple[float, float]:
        """Time of the rank's own block before and after all others."""
        seconds = self.kernel(call, plan.local)
        if self.backward and self.how.is_frugal and call.world > 1:
            return seconds / 2, seconds / 2
        return seconds, 0.0

    def share_bytes(self, call: Call) -> float:
        """Bytes of a row of gradients of keys and values; none go forward."""
        return call.kv_values * self.how.share_bytes if self.backward else 0.0

    def merging(self, call: Call, portions: int, q_rows: float, kv_rows: float) -> float:
        """Time to merge `portions` partial results: of out, or of dq and of dk and dv.

        From the third on the sum is fp32: a cast there and back.
        """
        narrow = self.how.is_frugal and portions <= 2
        each = self.how.gradient_merge_bytes if self.backward else self.how.merge_bytes
        each = 3 * call.value_bytes if narrow else each
        size = q_rows * call.q_values * each
        if self.backward:
            size += kv_rows * call.kv_values * each
        if q_rows and not narrow:
            size += 2 * call.rows * call.q_values * (4 + call.value_bytes)
        return size / self.hardware.memory_bandwidth

    def scatter(self, near_bytes: float, far_bytes: float) -> float:
        """Time to receive from the host and from others at the same time."""
        return max(self.link.seconds(near_bytes), self.hardware.inter.seconds(far_bytes))

    def packing(self, call: Call) -> float:
        """Time to write a block of keys and values where others can read it."""
        size = 2 * call.rows * call.kv_values * call.value_bytes
        return size / self.hardware.memory_bandwidth


def ring(call: Call, run: Pass, degree: int) -> Cost:
    """Every rank fetches the keys of all others, one owner a step; `degree` is 1."""
    return max((_ring(call, run, plan) for plan in plans(call)), key=lambda cost: cost.seconds)


def _ring(call: Call, run: Pass, plan: Plan) -> Cost:
    far = min(plan.steps, call.world - call.near)
    near = plan.steps - far
    fetch, share = plan.fetch_rows * call.kv_values * call.value_bytes, run.share_bytes(call)
    moved, step = fetch + plan.share_rows * share, run.kernel(call, plan.step)
    before, after = run.own(call, plan)
    first, last = (run.link, run.hardware.inter)[near == 0], (run.link, run.hardware.inter)[far > 0]
    exposed = stolen = 0.0
    if plan.steps:
        exposed, stolen = _hide(first, run.packing(call) + first.seconds(fetch), before)
        exposed += first.latency
        home = _hide(last, last.seconds(plan.share_rows * share), after)
        exposed, stolen = exposed + home[0], stolen + home[1]
    for link, count in ((run.link, near - (near > 0)), (run.hardware.inter, far - (near == 0))):
        if count > 0:
            waits, slower = _hide(link, link.seconds(moved), step)
            exposed, stolen = exposed + count * waits, stolen + count * slower
    compute = before + after + plan.steps * step + stolen
    merge = run.merging(call, plan.steps + 1, plan.steps * plan.merge_rows,
                        plan.steps * plan.share_rows)  # fmt: skip
    return Cost(compute, merge, exposed, near * moved, far * moved)


def _hide(link: Link, transfer: float, kernel: float) -> tuple[float, float]:
    """Seconds by which a transfer outlasts a kernel beside it, and by which it slows it."""
    return max(0.0, transfer - kernel), link.steal * min(transfer, kernel)


def double_ring(call: Call, run: Pass, degree: int) -> Cost:
    """Keys come once to each of `degree` hosts, to the rank of the same number, and go round it.

    The next host's block arrives while this one's goes round: one slow transfer for as many steps
    as a host has ranks. Gradients are summed in the host that used the keys and go home once.
    """
    costs = (_double_ring(call, run, degree, plan) for plan in plans(call))
    return max(costs, key=lambda cost: cost.seconds)


def _double_ring(call: Call, run: Pass, hosts: int, plan: Plan) -> Cost:
    if plan.steps < call.world - 1 or hosts == 1:  # few steps: nothing to nest
        return _ring(call, run, plan)
    inside, turns = call.world // hosts, hosts - 1
    first = _ring(call._replace(world=inside, near=inside), run, plan._replace(steps=inside - 1))
    outer = run.hardware.inter if call.near < call.world else run.link
    share = run.share_bytes(call)
    block, home = call.rows * call.kv_values * call.value_bytes, call.rows * share
    moved = plan.fetch_rows * call.kv_values * call.value_bytes + plan.share_rows * share
    step = run.kernel(call, plan.step)
    # A turn hides the next host's block coming and the last one's gradients going; a step inside it
    # hides the same for one rank. The first block and the last gradients cross alone.
    crossings = [_hide(outer, outer.seconds(block), inside * step),
                 _hide(outer, outer.seconds(home), run.own(call, plan)[1])]  # fmt: skip
    crossings += [_hide(outer, outer.seconds(block + home), inside * step)] * (turns - 1)
    crossings += [_hide(run.link, run.link.seconds(moved), step)] * (turns * (inside - 1))
    exposed = first.exposed + sum(waits for waits, _ in crossings)
    stolen = sum(slower for _, slower in crossings)
    merge = run.merging(call, plan.steps + 1, plan.steps * plan.merge_rows,
                        plan.steps * plan.share_rows)  # fmt: skip
    intra, inter = (inside - 1) * hosts * moved, turns * (block + home)
    if outer is run.link:
        intra, inter = intra + inter, 0.0
    compute = first.compute + turns * inside * step + stolen
    return Cost(compute, merge, exposed, intra, inter)


def all_gather(call: Call, run: Pass, degree: int) -> Cost:
    """All keys of a group of heads are fetched, then computed in one or two calls.

    A kernel with bands takes a rank's own keys with the others'; any other computes its own block
    meanwhile.
    """
    bands = run.hardware.kernel.bands
    plan = max(plans(call), key=lambda plan: plan.steps * plan.fetch_rows)
    rows = (call.world - 1) * call.rows if call.dense else plan.steps * plan.fetch_rows
    works = gathered(call, bands)
    others = sum(run.kernel(call, work) for work in works)
    before, after = (0.0, 0.0) if bands else run.own(call, plan)
    groups = gather_groups(call, run.how, bands)
    near = (call.near - 1) / max(1, call.world - 1)
    fetch, share = rows * call.kv_values * call.value_bytes, rows * run.share_bytes(call)
    arrive = run.scatter(fetch * near / groups, fetch * (1 - near) / groups)
    leave = run.scatter(share * near / groups, share * (1 - near) / groups)
    exposed, stolen = _hide(run.link, run.packing(call) + arrive, before)
    home = _hide(run.link, leave, after)
    middle = _hide(run.link, arrive + leave, others / groups)
    exposed += run.link.latency + home[0] + (groups - 1) * middle[0]
    stolen += home[1] + (groups - 1) * middle[1]
    again = (len(works) - bands) * call.rows if call.layout == "striped" else call.rows / 2
    again = 0.0 if bands and call.layout != "striped" else again
    merge = run.merging(call, 2, again if rows else 0.0, rows)
    moved = fetch + share
    compute = before + after + others + stolen
    return Cost(compute, merge, exposed, moved * near, moved * (1 - near))


def gather_groups(call: Call, how: Implementation, bands: bool) -> int:
    """Parts of the heads that all-gather takes one after another."""
    wanted = math.ceil(call.seq_len * call.kv_values * call.value_bytes / how.gathered_bytes)
    return max(1, min(int(call.kv_heads), max(wanted, 2 if bands else 1)))


def ulysses(call: Call, run: Pass, degree: int) -> Cost:
    """All ranks exchange sequence for heads and back: one call on the whole sequence."""
    return usp(call, run, call.world)


def usp(call: Call, run: Pass, degree: int) -> Cost:
    """Groups of `degree` neighbours exchange heads; a ring runs over the groups.

    The first group of heads on its way there and the last one on its way back are waited for.
    """
    inner = exchanged(call, degree)
    if inner.world == 1:
        cost = Cost(run.kernel(inner, whole(inner)))
    else:
        cost = ring(inner, run, 1)
    others = call.rows * (degree - 1)
    q, kv = others * inner.q_values, others * inner.kv_values
    into, out = (q + kv) * call.value_bytes, q * call.value_bytes
    if run.backward:  # dout in, dq, dk and dv out: q, k and v were kept
        into, out = q * call.value_bytes, q * call.value_bytes + kv * run.how.share_bytes
    near = (min(call.near, degree) - 1) / max(1, degree - 1)
    groups = 1
    if run.how.hides_exchange:
        groups = num_groups(int(inner.kv_heads), int(inner.rows * inner.heads))
    exposed, stolen = 0.0, 0.0
    for size in (into, out):
        one = run.scatter(size * near / groups, size * (1 - near) / groups)
        waits, slower = _hide(run.link, (groups - 1) * one, (1 - 1 / groups) * cost.compute / 2)
        exposed, stolen = exposed + one + waits, stolen + slower
    values = (into + out) / call.value_bytes * degree / max(1, degree - 1)
    packing = values * run.how.exchange_bytes / run.hardware.memory_bandwidth
    moved = into + out
    return cost + Cost(stolen, packing, exposed, moved * near, moved * (1 - near))


def exchanged(call: Call, degree: int) -> Call:
    """The call after groups of `degree` ranks exchanged sequence for heads.

    Where KV heads cannot be shared out evenly, they are repeated.
    """
    return call._replace(
        heads=call.heads / degree, kv_heads=math.lcm(int(call.kv_heads), degree) / degree,
        rows=call.rows * degree, world=call.world // degree, near=max(1, call.near // degree),
    )  # fmt: skip


STRATEGIES: dict[str, Callable[[Call, Pass, int], Cost]] = {
    "ring": ring,
    "all-gather": all_gather,
    "ulysses": ulysses,
    "usp": usp,
    "double-ring": double_ring,
}
