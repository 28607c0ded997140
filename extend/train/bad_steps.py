"""Steps that would spoil a model: a loss that is not finite or has exploded, and whose fault it is.

A loss has exploded when it lies `max_loss_rise` above the median of the last steps of its phase.
All processes see the same numbers, so all judge alike.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from extend.errors import TrainingError
from extend.train.batch import build_batch, token_weights
from extend.train.deal import deal

if TYPE_CHECKING:
    from extend.train.mesh import PhaseMesh
    from extend.train.session import Run

_MEMORY = 32  # steps whose median a loss is held against
_FEWEST = 8  # before so many steps of a phase, none has exploded
_MOST_NAMED = 8  # rows

RowLosses = list[tuple[int, float]]
"""Index of a row in its phase, and its mean loss a token."""


@dataclass
class LossHistory:
    """What the steps of a run gave so far.

    Attributes:
        nlls: of the last good steps of `phase`.
        skipped: how many steps were skipped, in all phases.
    """

    phase: int = 0
    nlls: list[float] = field(default_factory=list)
    skipped: int = 0

    @classmethod
    def read(cls, lines: Iterable[str], step: int) -> "LossHistory":
        """That of a run which goes on after `step`, by the lines of its metrics."""
        history = cls()
        for line in lines:
            record = json.loads(line) if line.endswith("\n") else {"step": step + 1}
            if record["step"] <= step:
                history.add(record["phase"] - 1, record["nll"], bool(record.get("skipped")))
        return history

    def add(self, phase: int, nll: float | None, skipped: bool) -> None:
        if phase != self.phase:
            self.phase, self.nlls = phase, []
        if skipped or nll is None:
            self.skipped += 1
        else:
            self.nlls = [*self.nlls, nll][-_MEMORY:]

    def judge(self, phase: int, nll: float, grad_norm: float, max_rise: float | None) -> str | None:
        """What is bad about a step; None when nothing is."""
        if not (math.isfinite(nll) and math.isfinite(grad_norm)):
            return f"loss {nll}, gradient norm {grad_norm}"
        if max_rise is None or phase != self.phase or len(self.nlls) < _FEWEST:
            return None
        usual = median(self.nlls)
        return None if nll <= usual + max_rise else (
            f"loss {nll:.3f}, which is more than max_loss_rise {max_rise:g} above the median "
            f"{usual:.3f} of the last {len(self.nlls)} steps")


def meet_bad_step(run: "Run", number: int, mesh: "PhaseMesh", step: int, bad: str) -> str:
    """Stop, or say why a step is skipped; all processes call it.

    Raises:
        TrainingError: the policy is to stop, or too many steps were skipped.
    """
    options = run.options
    where = f"step {step + 1} of phase {number + 1}: {bad}"
    told = f"{where}, from {_name_rows(run, number, step, _row_losses(run, number, mesh, step))}"
    if options.bad_loss == "stop":
        raise TrainingError(f"{told}; try a lower lr, more warm-up, or weight_dtype float32, mend "
                            "the rows, or set bad_loss skip, which passes over such steps")
    if run.history.skipped >= options.max_skipped_steps:
        raise TrainingError(f"{told}; {run.history.skipped} steps were skipped before it, as many "
                            "as max_skipped_steps allows; try a lower lr or more warm-up")
    return told


def _row_losses(run: "Run", number: int, mesh: "PhaseMesh", step: int) -> RowLosses:
    """The mean cross-entropy of every row of a step, distilled or not, each read by itself."""
    rows = run.options.schedule[number].batch_rows
    first = step * rows
    kinds = [run.rows.kind(number, first + row) for row in range(rows)]
    sums = torch.zeros(rows, 2, device=run.processes.device)
    for turn in deal([1] * rows, kinds, mesh.dp):
        mine = turn[mesh.dp_rank]
        batch = build_batch([run.rows.row(number, first + mine)], layout=run.options.layout,
                            rank=mesh.cp_rank, world=mesh.cp,
                            document_mask=run.options.document_mask)
        count = batch.counts()
        with torch.no_grad():
            nll = run.forward(mesh, batch.to(run.processes.device),
                              token_weights(batch, count, 0.0).to(run.processes.device))[1]
        if run.processes.tp_rank == 0:
            sums[mine] += torch.stack((nll.sum(), count[0].to(nll)))
    run.processes.sum(sums)
    return [(first + row, total / max(predicted, 1))
            for row, (total, predicted) in enumerate(sums.tolist())]


def _name_rows(run: "Run", number: int, step: int, losses: RowLosses) -> str:
    """The rows that are to blame, by source and place."""
    broken = [(index, loss) for index, loss in losses if not math.isfinite(loss)]
    if broken and len(broken) == len(losses) > 1:
        return (f"every one of rows {losses[0][0]} to {losses[-1][0]}, so the weights are spoilt, "
                f"not the rows: {_place(run, number, losses[0][0])} and so on")
    worst = broken or [max(losses, key=lambda entry: entry[1])]
    named = [f"row {index} (loss {loss:.3f}: {_place(run, number, index)})"
             for index, loss in worst[:_MOST_NAMED]]
    more = f" and {len(worst) - _MOST_NAMED} more" if len(worst) > _MOST_NAMED else ""
    how = "" if broken or len(losses) == 1 else f", whose loss is the largest of {len(losses)} rows"
    return ", ".join(named) + more + how


def _place(run: "Run", number: int, index: int) -> str:
    return run.rows.place(number, index)


def finite_or_none(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same without numbers that JSON lacks."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()}
