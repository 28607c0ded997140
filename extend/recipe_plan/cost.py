"""What one stage takes, and how it is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from extend.capacity import Machine
from extend.recipe_plan.facts import NOTHING, Facts

STREAMED = 0.9e9
"""Bytes/s, read and written, of stages that pass models through once. Llama-3.1-8B's shape on an
H100's host, page cache empty: 32 GB in 32.4 to 38.6 s (docs/results/surgery)."""
START_SECONDS = 10.0
"""Of a stage that loads a model: Python, torch, processes; assumed."""
WIDE = 0.5
"""By how much seconds may be off, as a fraction, where no step of the kind was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training at one length.

    Attributes:
        step_seconds: of an optimizer step.
        gpu_bytes: of one GPU at the fullest moment.
        recomputed: layers that are computed again.
        mfu: model FLOPs over those of the GPUs' data sheet.
        spread: by how much the seconds may be off, as a fraction.
    """

    length: int
    rows: int
    steps: int
    step_seconds: float
    gpu_bytes: float
    recomputed: int
    mfu: float
    spread: float

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a stage takes.

    Attributes:
        reads: what it reads; bytes, None where not known.
        writes: its output; bytes, None where not known.
        scratch: bytes beside the output until it is done.
        seconds: None where nothing is known of it.
        spread: by how much they may be off, as a fraction.
        gpus: that it computes on, 0 where it needs none.
        gpu_bytes: of one GPU at the fullest moment; None: not counted.
        host_bytes: of a host; None: not counted.
        fits: whether it can run on the machine.
        output: what later stages read.
        phases: of a training.
        notes: what else there is to say; of what does not fit, why.
    """

    reads: int | None = 0
    writes: int | None = 0
    scratch: int = 0
    seconds: float | None = None
    spread: float = WIDE
    gpus: int = 0
    gpu_bytes: float | None = None
    host_bytes: float | None = None
    fits: bool = True
    output: Facts = NOTHING
    phases: Sequence[Phase] = ()
    notes: Sequence[str] = ()


# (options, input -> facts, the machine) -> cost
Estimate = Callable[[Any, Callable[[str], Facts], Machine], Cost]


def add_bytes(*sizes: int | None) -> int | None:
    """Their sum; None where one is not known."""
    return None if None in sizes else sum(sizes)


def streamed_seconds(*sizes: int | None) -> float | None:
    """Of a stage that passes so many bytes through once."""
    total = add_bytes(*sizes)
    return None if total is None else START_SECONDS / 2 + total / STREAMED
