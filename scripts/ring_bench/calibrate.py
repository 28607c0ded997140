"""Section calibrate: the rates and links of this machine, and what the cost model makes of them."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from extend.errors import ExtendError
from extend.ring.comm import RingComm
from extend.ring.cost.hardware import Hardware, Measurement, find_hardware, fit, harmonic
from extend.ring.cost.predict import predict
from extend.ring.kernels import KERNELS
from extend.ring.mask import CAUSAL, FULL
from ring_bench.problems import DTYPES, Problem
from ring_bench.session import Session
from ring_bench.timing import repeats

MIB = 1 << 20


def calibrate(session: Session, problem: Problem, kernels: list[str], lengths: list[int]) -> dict:
    """The fitted Hardware of each kernel, and all measurements.

    Squares of `lengths` and rectangles of half that, forward and backward; copies and NCCL messages
    between neighbours, alone and beside a kernel; a merge.
    """
    name = torch.cuda.get_device_name() if session.is_cuda else "h200"
    links, reasons = measure_links(session, problem, lengths[-1])
    fitted, measured = {}, list(links)
    for kernel in kernels:
        measure = partial(measure_kernel, session, problem, kernel, lengths)
        rates, reason = session.attempt(measure)
        if reason:
            reasons[kernel] = reason
            continue
        measured += rates
        fitted[kernel] = asdict(fit([*links, *rates], find_hardware(name, kernel)))
    first = next(iter(fitted.values()), None)
    return {
        "hardware": first, "kernels": fitted, "not_measured": reasons,
        "measurements": [m._asdict() for m in measured],
    }  # fmt: skip


def measure_kernel(
    session: Session, problem: Problem, kernel: str, lengths: list[int]
) -> list[Measurement]:
    """Squares and rectangles of one kernel.

    Raises:
        ExtendError: the kernel does not take these tensors.
    """
    found = []
    for length in lengths:
        q, k, v, dout = problem.tensors(length, session.device)
        if reason := KERNELS[kernel].refuse(q, k):
            raise ExtendError(reason)
        half = length // 2
        found += _both(session, kernel, problem, (q, k, v, dout), True)
        found += _both(session, kernel, problem, (q, k[:, :, :half], v[:, :, :half], dout), False)
        found += _both(session, kernel, problem, (q[:, :, :half], k, v, dout[:, :, :half]), False)
    return found


def _both(
    session: Session, kernel: str, problem: Problem, tensors: tuple[Tensor, ...], causal: bool
) -> list[Measurement]:
    q, k, v, dout = tensors
    forward, backward = _calls(kernel, q, k, v, dout, causal)
    q_len, kv_len = q.shape[2], k.shape[2]
    pairs = q_len * kv_len / (2 if causal else 1)
    kind = "square" if causal else "rectangle"
    flops = 4 * problem.head_dim * problem.heads * pairs
    measured = []
    for name, call, amount in ((kind, forward, flops), (f"{kind}_backward", backward, 2.5 * flops)):
        seconds = timed(session, call)
        measured.append(Measurement(name, seconds, amount, harmonic(q_len, kv_len)))
    return measured


def _calls(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One block forward and backward."""
    options = {"softmax_scale": q.shape[-1] ** -0.5, "mask": CAUSAL if causal else FULL}
    out, lse = KERNELS[kernel].forward(q, k, v, **options)
    return (
        lambda: KERNELS[kernel].forward(q, k, v, **options),
        lambda: KERNELS[kernel].backward(dout, q, k, v, out, lse, **options),
    )


def timed(session: Session, call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    once = session.time_calls(call, 1)
    return session.time_calls(call, repeats(once)) / 1e3


def measure_links(
    session: Session, problem: Problem, length: int
) -> tuple[list[Measurement], dict[str, str]]:
    """Memory, NCCL (or gloo) messages and copies out of a peer's memory."""
    size = 64 * MIB if session.is_cuda else MIB
    total = torch.zeros(size // 4, device=session.device)
    part = torch.ones(size // 4, device=session.device, dtype=DTYPES["bf16"])
    found = [Measurement("memory_bandwidth", timed(session, lambda: total.add_(part)), 2.5 * size)]
    reasons: dict[str, str] = {}
    if session.world == 1:
        return found, {"nccl": "one rank", "pull": "one rank"}
    sizes = (32 * MIB, 256 * MIB) if session.is_cuda else (MIB // 4, MIB)
    for kind, measure in (("nccl", _message), ("pull", _pull)):
        for number in sizes:
            call, reason = session.attempt(lambda m=measure, n=number: m(session, n))
            if reason:
                reasons[kind] = reason
                break
            found.append(Measurement(kind, timed(session, call), number))
    return found, reasons


def _message(session: Session, size: int) -> Callable[[], None]:
    """Send to the next rank while receiving from the one before."""
    sent = torch.zeros(size, dtype=torch.uint8, device=session.device)
    received = torch.empty_like(sent)
    after, before = (session.rank + 1) % session.world, (session.rank - 1) % session.world

    def call() -> None:
        ops = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    return call


def _pull(session: Session, size: int) -> Callable[[], None]:
    """Copy out of the memory that the rank before offers.

    Raises:
        CompatibilityError: there is no such way between these ranks.
    """
    comm = RingComm(transport="peer")
    into = torch.empty(size, dtype=torch.uint8, device=session.device)
    window = comm.publish(f"calibrate {size}", (size,), into, lambda buffer: buffer.zero_())
    return lambda: window.fetch(1, into, lambda buffer, receiver: buffer).wait()


def compare_predictions(
    groups: list[dict[str, Any]], fitted: dict[str, dict[str, Any]], shape: dict[str, int],
    world: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measured and predicted milliseconds of our own rows of section time, by the fitted rates."""
    rows = []
    for group in groups:
        for row in group["rows"]:
            strategy, _, layout = row["name"].partition(" ")[0].partition("/")
            if row["family"] != "ours" or row["kernel"] not in fitted:
                continue
            if strategy in ("auto", "usp", "double-ring"):  # it does not say what was run
                continue
            seconds = predict(
                strategy, **shape, seq_len=group["seq_len"], world=world,
                layout=layout or "zigzag", backward=row["kind"] != "fwd",
                hardware=Hardware.from_fields(fitted[row["kernel"]]),
            ).seconds  # fmt: skip
            rows.append({
                "name": row["name"], "kind": row["kind"], "seq_len": group["seq_len"],
                "ms": row["ms"], "predicted_ms": 1e3 * seconds,
            })  # fmt: skip
    return rows
