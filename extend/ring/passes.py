"""One pass of attention, forward or backward, under each strategy: seconds and bytes of one rank.

The assumptions are written down in cost.py, which adds the passes up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from extend.ring.hardware import Hardware, Link
from extend.ring.workload import Call, Plan, Work, gathered, kernel_seconds, plans, whole


@dataclass(frozen=True)
class Implementation:
    """How a ring is written, where that changes what is moved.

    Attributes:
        transport: inside a host: "peer" (copy engines pull) or "nccl" (send and receive).
        merge_bytes: memory traffic for each value of a partial out that is merged.
        gradient_merge_bytes: the same for a partial dq, dk or dv.
        share_bytes: bytes a value of dK and dV on the wire.
        pack_bytes: memory traffic for each value that Ulysses packs or unpacks, both ends together.
        head_groups: parts into which all-gather and Ulysses cut the KV heads, to overlap them.
    """

    transport: str = "peer"
    merge_bytes: float = 10  # fp32 read and written, bf16 read
    gradient_merge_bytes: float = 10
    share_bytes: float = 2
    pack_bytes: float = 4  # into the buffer that others pull from
    head_groups: int = 4


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

    def share_bytes(self, call: Call) -> float:
        """Bytes of a row of gradients of keys and values; none go forward."""
        return call.kv_values * self.how.share_bytes if self.backward else 0.0

    def merging(self, call: Call, q_rows: float, kv_rows: float) -> float:
        """Time to merge partial results: of out, or of dq and of dk and dv; and the last cast."""
        if self.backward:
            values = q_rows * call.q_values + kv_rows * call.kv_values
            size = values * self.how.gradient_merge_bytes
        else:
            size = q_rows * call.q_values * self.how.merge_bytes
        cast = call.rows * call.q_values * (4 + call.value_bytes) if q_rows else 0.0
        return (size + cast) / self.hardware.memory_bandwidth

    def scatter(self, near_bytes: float, far_bytes: float) -> float:
        """Time to receive from the host and from others at the same time."""
        return max(self.link.seconds(near_bytes), self.hardware.inter.seconds(far_bytes))


def ring(call: Call, run: Pass, degree: int) -> Cost:
    """Every rank fetches the keys of all others, one owner a step; `degree` is 1."""
    return max((_ring(call, run, plan) for plan in plans(call)), key=lambda cost: cost.seconds)


def _ring(call: Call, run: Pass, plan: Plan) -> Cost:
    far = min(plan.steps, call.world - call.near)
    near = plan.steps - far
    fetch, share = plan.fetch_rows * call.kv_values * call.value_bytes, run.share_bytes(call)
    moved = fetch + plan.share_rows * share
    local, step = run.kernel(call, plan.local), run.kernel(call, plan.step)
    exposed, stolen = _first_exposed(call, run, near > 0, fetch, local) if plan.steps else (0, 0)
    for link, count in ((run.link, near - (near > 0)), (run.hardware.inter, far - (near == 0))):
        seconds = link.seconds(moved)
        exposed += max(0, count) * max(0.0, seconds - step)
        stolen += max(0, count) * link.steal * min(seconds, step)
    if plan.steps and share:  # the last share goes home when nothing is left to compute
        last = run.hardware.inter if far else run.link
        exposed += last.seconds(plan.share_rows * share)
    merge = run.merging(call, plan.steps * plan.merge_rows, plan.steps * plan.share_rows)
    compute = local + plan.steps * step + stolen
    return Cost(compute, merge, exposed, near * moved, far * moved)


def _first_exposed(
    call: Call, run: Pass, is_near: bool, fetch: float, local: float
) -> tuple[float, float]:
    """Seconds exposed and stolen by the first fetch, which the rank's own block hides."""
    link = run.link if is_near else run.hardware.inter
    packing = 2 * call.rows * call.kv_values * call.value_bytes / run.hardware.memory_bandwidth
    seconds = packing + link.seconds(fetch)
    return link.latency + max(0.0, seconds - local), link.steal * min(seconds, local)


def double_ring(call: Call, run: Pass, degree: int) -> Cost:
    """Keys come once to each of `degree` hosts, to the rank of the same number, and go round it.

    The next host's block arrives while this one's goes round: one slow transfer for as many steps
    as a host has ranks. Gradients are summed in the host that used the keys and go home once.
    """
    return max(
        (_double_ring(call, run, degree, plan) for plan in plans(call)),
        key=lambda cost: cost.seconds,
    )


def _double_ring(call: Call, run: Pass, hosts: int, plan: Plan) -> Cost:
    inside = call.world // hosts
    flat = _ring(call._replace(world=inside, near=inside), run, plan._replace(steps=inside - 1))
    if plan.steps < call.world - 1:  # a window or documents: too few steps to nest
        return _ring(call, run, plan)
    outer = run.hardware.inter if call.near < call.world else run.link
    block = call.rows * call.kv_values * call.value_bytes
    imported = block + call.rows * run.share_bytes(call)
    moved = plan.fetch_rows * call.kv_values * call.value_bytes
    moved += plan.share_rows * run.share_bytes(call)
    step, turns = run.kernel(call, plan.step), hosts - 1
    turn = outer.seconds(imported)
    inner = run.link.seconds(moved)
    exposed = turns * (max(0.0, turn - inside * step) + (inside - 1) * max(0.0, inner - step))
    if run.backward and turns:
        exposed += outer.seconds(call.rows * run.share_bytes(call))
    stolen = turns * (outer.steal * min(turn, inside * step))
    stolen += turns * (inside - 1) * run.link.steal * min(inner, step)
    merge = run.merging(call, plan.steps * plan.merge_rows, plan.steps * plan.share_rows)
    intra = (inside - 1) * hosts * moved
    inter = turns * imported
    if outer is run.link:
        intra, inter = intra + inter, 0.0
    compute = flat.compute + turns * inside * step + stolen
    return Cost(compute, merge, flat.exposed + exposed, intra, inter)


def all_gather(call: Call, run: Pass, degree: int) -> Cost:
    """All keys of a group of heads are fetched, then computed in one or two calls."""
    groups = max(1, min(run.how.head_groups, call.kv_heads))
    works = gathered(call)
    compute = sum(run.kernel(call, work) for work in works)
    plan = max(plans(call), key=lambda plan: plan.steps * plan.fetch_rows)
    rows = plan.steps * plan.fetch_rows
    if call.dense:
        rows = (call.world - 1) * call.rows
    near = (call.near - 1) / max(1, call.world - 1)
    fetch = rows * call.kv_values * call.value_bytes
    share = rows * run.share_bytes(call)
    arrive = run.scatter(fetch * near / groups, fetch * (1 - near) / groups)
    leave = run.scatter(share * near / groups, share * (1 - near) / groups)
    hidden = compute / groups
    exposed = arrive + leave + (groups - 1) * max(0.0, arrive + leave - hidden)
    stolen = (groups - 1) * run.link.steal * min(arrive + leave, hidden)
    again = 0.0 if run.hardware.kernel.bands else call.rows * (len(works) > 1)
    if call.layout == "striped" and call.dense:
        again = (call.world - 1) * call.rows
    merge = run.merging(call, again, rows + (call.seq_len if len(works) > 1 else 0.0))
    moved = fetch + share
    return Cost(compute + stolen, merge, exposed, moved * near, moved * (1 - near))


def ulysses(call: Call, run: Pass, degree: int) -> Cost:
    """All ranks exchange sequence for heads and back: one call on the whole sequence."""
    inner, into, out = _exchange(call, run, call.world)
    compute = run.kernel(inner, whole(inner))
    groups = max(1, min(run.how.head_groups, inner.kv_heads))
    return _around(call, run, Cost(compute), call.world, into, out, groups)


def usp(call: Call, run: Pass, degree: int) -> Cost:
    """Groups of `degree` neighbours exchange heads; a ring runs over the groups."""
    inner, into, out = _exchange(call, run, degree)
    return _around(call, run, ring(inner, run, 1), degree, into, out, groups=1)


def exchanged(call: Call, degree: int) -> Call:
    """The call after groups of `degree` ranks exchanged sequence for heads.

    Where there are fewer KV heads than ranks, KV heads are repeated.
    """
    return call._replace(
        heads=call.heads / degree, kv_heads=max(1.0, call.kv_heads / degree),
        rows=call.rows * degree, world=call.world // degree, near=max(1, call.near // degree),
    )  # fmt: skip


def _exchange(call: Call, run: Pass, degree: int) -> tuple[Call, float, float]:
    """The call after an exchange of heads, and the bytes that a rank received and returned."""
    inner = exchanged(call, degree)
    others = call.rows * (degree - 1)
    q, kv = others * inner.q_values, others * inner.kv_values
    if run.backward:  # dout in, dq, dk and dv out: q, k and v were kept
        return inner, q * call.value_bytes, q * call.value_bytes + kv * run.how.share_bytes
    return inner, (q + kv) * call.value_bytes, q * call.value_bytes


def _around(
    call: Call, run: Pass, cost: Cost, degree: int, into: float, out: float, groups: int
) -> Cost:
    """`cost` with an exchange of heads before and after, in `groups` that overlap."""
    near = (min(call.near, degree) - 1) / max(1, degree - 1)
    arrive = run.scatter(into * near / groups, into * (1 - near) / groups)
    leave = run.scatter(out * near / groups, out * (1 - near) / groups)
    hidden = cost.seconds / groups
    exposed = arrive + leave + (groups - 1) * max(0.0, arrive + leave - hidden)
    stolen = (groups - 1) * run.link.steal * min(arrive + leave, hidden)
    values = (into + out) / call.value_bytes * degree / max(1, degree - 1)
    packing = values * run.how.pack_bytes / run.hardware.memory_bandwidth
    moved = into + out
    return cost + Cost(stolen, packing, exposed, moved * near, moved * (1 - near))


STRATEGIES: dict[str, Callable[[Call, Pass, int], Cost]] = {
    "ring": ring,
    "all-gather": all_gather,
    "ulysses": ulysses,
    "usp": usp,
    "double-ring": double_ring,
}
