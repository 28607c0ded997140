"""How much one rank computes and receives in one attention call, for the cost model.

Rows are tokens of one rank, pairs are (query, key) pairs that a mask lets through, of one head.
Without window and documents the blocks are those of the layout; with them, a rank's pairs and the
rows that it must receive are counted from the positions it holds.
"""

from functools import lru_cache
from typing import NamedTuple

from extend.ring.cost.hardware import Hardware, harmonic


class Call(NamedTuple):
    """One call; `rows` and `world` are those of the ring, after heads were exchanged."""

    heads: float
    kv_heads: float
    head_dim: int
    rows: float
    world: int
    near: int  # of the ring's ranks, those in this rank's own host, itself included
    layout: str
    causal: bool
    window: float
    document: float  # length of every document; the whole sequence is one
    value_bytes: int
    batch: int

    @property
    def seq_len(self) -> float:
        return self.rows * self.world

    @property
    def dense(self) -> bool:
        """No window and no documents."""
        return self.window >= self.seq_len and self.document >= self.seq_len

    @property
    def q_values(self) -> float:
        """Values in a row of q or out."""
        return self.batch * self.heads * self.head_dim

    @property
    def kv_values(self) -> float:
        """Values in a row of k and v."""
        return 2 * self.batch * self.kv_heads * self.head_dim


class Work(NamedTuple):
    """One kernel call: its pairs, the length its rate is looked up at, and which rate."""

    pairs: float
    length: float
    is_square: bool


class Plan(NamedTuple):
    """One rank's call: its own keys first, then `steps` equal steps with keys of other ranks.

    A step fetches `fetch_rows` rows of keys and values, receives `share_rows` rows of gradients of
    its own keys in the backward pass, and merges `merge_rows` rows of partial results.
    """

    local: Work
    step: Work
    steps: int
    fetch_rows: float
    share_rows: float
    merge_rows: float


def square(length: float) -> Work:
    """A causal block."""
    return Work(length * length / 2, length, is_square=True)


def rectangle(q_len: float, kv_len: float) -> Work:
    """A block without a mask."""
    return Work(q_len * kv_len, harmonic(q_len, kv_len) if kv_len else 1.0, is_square=False)


def kernel_seconds(call: Call, work: Work, hardware: Hardware, backward: bool) -> float:
    """Time of one kernel call, forward or backward."""
    if not work.pairs:
        return 0.0
    rates = hardware.kernel
    if backward:
        rate = rates.square_backward if work.is_square else rates.rectangle_backward
    else:
        rate = rates.square if work.is_square else rates.rectangle
    flops = (10 if backward else 4) * call.head_dim * call.heads * call.batch * work.pairs
    return rate.seconds(flops, work.length) + hardware.launch_seconds


def whole(call: Call) -> Work:
    """The whole sequence in one call, as one GPU would do it."""
    seq_len = call.seq_len
    if call.dense:
        return square(seq_len) if call.causal else rectangle(seq_len, seq_len)
    return Work(_pairs_before(call, seq_len), min(call.window, call.document), is_square=True)


def gathered(call: Call, own: bool) -> tuple[Work, ...]:
    """A rank's queries against all ranks' keys, in the order of positions; the slowest rank.

    With its `own` keys, a rectangle that is causal at its end counts as rectangle and square.
    """
    rows, others = call.rows, call.rows * (call.world - 1)
    if not call.dense or call.layout == "striped":
        plan = max(plans(call), key=lambda plan: plan.local.pairs + plan.steps * plan.step.pairs)
        if call.dense:
            return (plan.local,) * own + (plan.step,) * plan.steps
        pairs = own * plan.local.pairs + plan.steps * plan.step.pairs
        return (Work(pairs, plan.local.length, is_square=True),)
    if not call.causal:
        return (rectangle(rows, others + own * rows),)
    if call.layout == "contiguous":
        return (square(rows),) * own + (rectangle(rows, others),)
    if not own:
        return (rectangle(rows / 2, others),) if others else ()
    return square(rows / 2), square(rows / 2), rectangle(rows / 2, others + rows / 2)


@lru_cache(maxsize=1024)
def plans(call: Call) -> tuple[Plan, ...]:
    """The plans of the ranks that may be the slowest."""
    rows, steps = call.rows, call.world - 1
    if not call.dense:
        return _sparse_plans(call)
    if not call.causal:
        block = rectangle(rows, rows)
        return (Plan(block, block, steps, rows, rows, rows),)
    if call.layout == "contiguous":
        return (Plan(square(rows), rectangle(rows, rows), steps, rows, rows, rows),)
    if call.layout == "striped":
        return (Plan(square(rows), square(rows), steps, rows, rows, rows),)
    half = rectangle(rows, rows / 2)
    return (
        Plan(square(rows), half, steps, rows, rows / 2, rows / 2),  # the first rank
        Plan(square(rows), half, steps, rows / 2, rows, rows),  # the last rank
    )


def _sparse_plans(call: Call) -> tuple[Plan, ...]:
    if call.layout == "striped":
        return (_striped_plan(call),)
    last = call.world - 1
    ranks = {0, min(1, last), last // 2, max(0, last - 1), last}  # the ends and the middle
    found = [_sparse_plan(call, rank) for rank in ranks]
    most_work = max(found, key=lambda plan: plan.local.pairs + plan.steps * plan.step.pairs)
    most_rows = max(found, key=lambda plan: plan.steps * plan.fetch_rows)
    return (most_work,) if most_work == most_rows else (most_work, most_rows)


def _striped_plan(call: Call) -> Plan:
    """Every rank holds a part of every window and document, and needs the others' parts."""
    pairs, length = whole(call).pairs / call.world, min(call.window, call.document)
    steps = int(min(call.world - 1, length - 1))
    work = Work(pairs / (steps + 1), max(1.0, length / call.world), is_square=True)
    return Plan(work, work, steps, call.rows, call.rows, call.rows)


def _sparse_plan(call: Call, rank: int) -> Plan:
    """Pairs and remote rows of a rank that holds one piece, or a head and a tail piece."""
    if call.layout == "contiguous":
        pieces = [(rank * call.rows, (rank + 1) * call.rows)]
    else:
        size, mirror = call.rows / 2, 2 * call.world - 1 - rank
        pieces = [(rank * size, (rank + 1) * size), (mirror * size, (mirror + 1) * size)]
    pairs = sum(_pairs_before(call, end) - _pairs_before(call, start) for start, end in pieces)
    local = sum(_own_pairs(call, start, end) for start, end in pieces)
    needed = [(start - _rows_back(call, start), start) for start, _ in pieces]
    remote = _union(needed) - sum(_overlap(need, piece) for need in needed[1:]
                                  for piece in pieces[:1])
    size = pieces[0][1] - pieces[0][0]
    steps = min(call.world - 1, sum(_parts(end - start, size) for start, end in needed))
    length = min(call.window, call.document, call.rows)
    if not steps or not remote:
        return Plan(Work(pairs, length, True), Work(0.0, 1.0, True), 0, 0.0, 0.0, 0.0)
    step = Work((pairs - local) / steps, length, is_square=True)
    sees_others = sum(min(size, min(call.window, call.document)) for start, end in needed
                      if end > start)
    return Plan(
        Work(local, length, is_square=True), step, steps, remote / steps, remote / steps,
        sees_others / steps,
    )  # fmt: skip


def _pairs_before(call: Call, position: float) -> float:
    """Pairs of all queries before `position`."""
    full, rest = divmod(position, call.document)
    return full * _triangle(call, call.document) + _triangle(call, rest)


def _triangle(call: Call, length: float) -> float:
    """Pairs of the first `length` queries of a document."""
    if not call.causal:
        return length * call.document
    capped = min(length, call.window)
    return capped * (capped + 1) / 2 + (length - capped) * call.window


def _own_pairs(call: Call, start: float, end: float) -> float:
    """Pairs of a piece with keys of the same piece."""
    head = min(end - start, -start % call.document)  # the rest of the document it begins in
    if not call.causal:
        return (end - start) * min(call.document, end - start)
    return _triangle(call, head) + _pairs_before(call, end) - _pairs_before(call, start + head)


def _rows_back(call: Call, start: float) -> float:
    """Rows before `start` that queries from `start` on can see."""
    return min(start % call.document, call.window - 1)


def _parts(rows: float, size: float) -> int:
    return int(-(-rows // size))


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans that are sorted by their end."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
