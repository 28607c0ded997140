"""Sections time, packed and window: milliseconds of everybody, in rounds.

A GPU's clock drifts by a tenth while a benchmark runs. So each round times everybody once, one GPU
alone included, each round begins with the next contender, and an efficiency is the median over
rounds of quotients taken within a round.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ring_bench.contenders import Contender, Forward, OneGpu
from ring_bench.problems import Problem
from ring_bench.session import Session

KINDS = ("fwd", "fwd+bwd")
BATCH_SECONDS = 0.05  # a measurement repeats short calls for about so long
LONG_MS = 500.0  # a call that needs no other before it to warm the GPU


@dataclass
class Entry:
    """A contender that works, with what was measured of it: milliseconds a round, by kind."""

    contender: Contender
    forward: Forward
    tensors: list[Tensor]
    scale: int = 1  # computed only 1 / scale of the heads
    estimate: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})


def time_problem(
    session: Session, problem: Problem, contenders: list[Contender], rounds: int, seconds: float,
    largest_single_seconds: float,
) -> dict[str, Any]:
    """Rows for one problem: up to `rounds` rounds within `seconds`, not counting first calls.

    One GPU gets an even fraction of the heads where all would take longer than
    `largest_single_seconds` a call; its times are multiplied accordingly and marked.
    """
    pool: dict[tuple[int, int], list[Tensor]] = {}
    entries, reasons = [], {}
    for contender in contenders:
        scale = single_scale(problem, contender, largest_single_seconds)
        if session.left() < least_seconds(session, problem, contender, scale):
            reasons[contender.name] = "dropped: no time left in the budget"
            continue
        entry, reason = prepare(session, problem, contender, scale, pool)
        if reason:
            reasons[contender.name] = reason
        else:
            entries.append(entry)
    # First calls compile: kernels that do so for long must not leave no time to measure.
    done = run_rounds(session, entries, rounds, max(0.0, session.left() - seconds))
    rows = [row for entry in entries for row in summarize(session, problem, entry, entries)]
    return {
        "mask": problem.mask, "seq_len": problem.seq_len, "rounds": done, "rounds_wanted": rounds,
        "rows": rows if done else [], "not_measured": reasons,
    }  # fmt: skip


def single_scale(problem: Problem, contender: Contender, largest_seconds: float) -> int:
    """By how much to cut the heads of a contender that computes the whole sequence alone."""
    if contender.family != "one GPU" or contender.local:
        return 1
    seconds = problem.flops("fwd+bwd") / 5e14  # at the speed of a Hopper GPU
    scale = 1
    while seconds / scale > largest_seconds and problem.kv_heads % (2 * scale) == 0:
        scale *= 2
    return scale


def least_seconds(session: Session, problem: Problem, contender: Contender, scale: int) -> float:
    """What a first call and one round will take at the least, on a GPU."""
    if not session.is_cuda:
        return 0.0
    parts = scale if contender.family == "one GPU" else session.world
    share = contender.rows(problem, session) / problem.seq_len if parts == scale else 1.0
    return 2.5 * problem.flops("fwd+bwd") * share**2 / parts / 6e14


def prepare(
    session: Session, problem: Problem, contender: Contender, scale: int,
    pool: dict[tuple[int, int], list[Tensor]],
) -> tuple[Entry | None, str | None]:  # fmt: skip
    """Build a contender and call it once, which compiles and connects; then estimate its times."""

    def build() -> Entry:
        rows = contender.rows(problem, session)
        if (rows, scale) not in pool:
            pool[rows, scale] = problem.tensors(rows, session.device, scale)
        with contender.context():
            entry = Entry(contender, contender.build(problem, session), pool[rows, scale], scale)
            for kind in KINDS:
                start = time.perf_counter()
                make_call(entry, kind)()
                session.synchronize()
                entry.estimate[kind] = 1e3 * (time.perf_counter() - start)
        return entry

    entry, reason = session.attempt(build)
    if reason:
        return None, reason
    with contender.context():
        for kind in KINDS:
            first = session.slowest(entry.estimate[kind])
            if first < 4 * LONG_MS:  # may have been compiling: once more
                first = session.time_calls(make_call(entry, kind), 1, warm=False)
            entry.estimate[kind] = first
    return entry, None


def make_call(entry: Entry, kind: str) -> Callable[[], None]:
    """Forward without gradients, or forward and backward."""
    *inputs, dout = entry.tensors

    def forward() -> None:
        with torch.no_grad():
            entry.forward(*inputs)

    def both() -> None:
        leaves = [t.detach().requires_grad_() for t in inputs]
        torch.autograd.grad(entry.forward(*leaves), leaves, dout)

    return forward if kind == "fwd" else both


def run_rounds(session: Session, entries: list[Entry], rounds: int, end: float) -> int:
    """Time everybody once a round, while the next round fits; returns how many were done."""
    for done in range(rounds):
        needed = 1.2e-3 * sum(
            ((ms < LONG_MS) + repeats(ms)) * ms
            for entry in entries for ms in entry.estimate.values()
        )  # fmt: skip
        if session.left() - needed < end:
            return done
        start = done % max(1, len(entries))
        for entry in entries[start:] + entries[:start]:
            with entry.contender.context():
                for kind in KINDS:
                    before = entry.estimate[kind]
                    ms = session.time_calls(
                        make_call(entry, kind), repeats(before), warm=before < LONG_MS
                    )
                    entry.rounds[kind].append(ms * entry.scale)
    return rounds


def repeats(milliseconds: float) -> int:
    """How often a measurement repeats a call."""
    return max(1, min(10, int(1e3 * BATCH_SECONDS / milliseconds)))


def summarize(
    session: Session, problem: Problem, entry: Entry, entries: list[Entry]
) -> list[dict[str, Any]]:
    """A row for each kind: median, spread, TFLOP/s per GPU and the efficiencies."""
    contender, rows = entry.contender, []
    alone = contender.family == "one GPU"
    for kind in KINDS:
        times = entry.rounds[kind]
        if not times:
            continue
        ms = statistics.median(times)
        share = contender.rows(problem, session) / problem.seq_len
        flops = problem.flops(kind) * (share**2 if alone else 1 / session.world)
        row = {
            "name": contender.name, "family": contender.family, "kernel": contender.kernel,
            "kind": kind, "ms": ms, "ms_low": min(times), "ms_high": max(times),
            "tflops_per_gpu": flops / ms / 1e9, "heads_scale": entry.scale,
        }  # fmt: skip
        if not alone:
            row |= efficiencies(session.world, kind, entry, entries)
        rows.append(row)
    return rows


def efficiencies(
    world: int, kind: str, entry: Entry, entries: list[Entry]
) -> dict[str, float | None]:
    """Median quotients: against the best kernel on one GPU, the same one, and the local length.

    Against the whole sequence: (one GPU's time / GPUs) / time. Against the local length: as many
    times that call as a GPU has such blocks to compute, GPUs / 1 of them.
    """
    whole = [e for e in entries if isinstance(e.contender, OneGpu) and not e.contender.local]
    local = [e for e in entries if isinstance(e.contender, OneGpu) and e.contender.local]
    best = min(whole, key=lambda e: statistics.median(e.rounds[kind]), default=None)
    same = [e for e in whole if e.contender.kernel == entry.contender.kernel]
    near = [e for e in local if e.contender.kernel == entry.contender.kernel]
    return {
        "eff_best": _quotient(best, entry, kind, 1 / world),
        "eff_same": _quotient(same[0] if same else None, entry, kind, 1 / world),
        "eff_local": _quotient(near[0] if near else None, entry, kind, world),
    }


def _quotient(single: Entry | None, entry: Entry, kind: str, factor: float) -> float | None:
    if single is None:
        return None
    pairs = zip(single.rounds[kind], entry.rounds[kind], strict=True)
    return statistics.median(factor * alone / ms for alone, ms in pairs)
