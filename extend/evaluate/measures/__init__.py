"""How prompts become rows. To add a measure: one function, a line in MEASURES, a test."""

from collections.abc import Callable, Sequence
from typing import Any

from extend.evaluate.backends.backend import Backend
from extend.evaluate.frame import Frame
from extend.evaluate.measures.answers import exact, loss
from extend.evaluate.measures.divergence import divergence
from extend.evaluate.measures.generated import generated
from extend.evaluate.measures.harness import harness
from extend.evaluate.measures.key_tokens import key_tokens
from extend.evaluate.measures.positions import positions
from extend.evaluate.measures.sliding import sliding
from extend.evaluate.measures.stream import stream
from extend.evaluate.tasks.task import Cell, Task

__all__ = ["MEASURES", "Measure"]

# (what runs the model, how prompts are put, the task, its cells, the seed) -> a row for each cell
Measure = Callable[[Backend, Frame, Task, Sequence[Cell], int], list[dict[str, Any]]]

MEASURES: dict[str, Measure] = {
    "exact": exact, "loss": loss, "generated": generated, "stream": stream,
    "divergence": divergence, "positions": positions, "sliding": sliding,
    "key-tokens": key_tokens, "harness": harness}
