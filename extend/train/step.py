"""One optimizer step: rows to batches, forward and backward, clipping, update."""

import logging
import math
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extend.errors import DataError, TrainingError
from extend.train.bad_steps import finite_or_none, meet_bad_step
from extend.train.batch import Batch, build_batch, token_weights
from extend.train.data import Row
from extend.train.deal import deal, imbalance, join_turns
from extend.train.equality import find_difference
from extend.train.mesh import PhaseMesh
from extend.train.optim import (
    clip_gradients,
    learning_rate,
    seed_rounding,
    set_learning_rate,
)
from extend.train.session import Run

logger = logging.getLogger(__name__)

_MICRO_TOKENS = 8192  # short rows are computed together, up to this many local tokens


class StepWork(NamedTuple):
    """What one process computes in a step.

    Attributes:
        batches: of its group's rows, its part of each.
        imbalance: how unevenly the attention of the step is spread over the groups, 1.0 is evenly.
        digest: of its group's whole rows.
    """

    batches: list[Batch]
    imbalance: float
    digest: int = 0


class StepResult(NamedTuple):
    """What one optimizer step gave, over all processes.

    Attributes:
        metrics: what is told of it.
        flops: what it took, recomputed activations not counted.
        told_to_stop: whether any process was told to stop before it began.
    """

    metrics: dict[str, Any]
    flops: float
    told_to_stop: bool


@contextmanager
def prefetch(run: Run, number: int, mesh: PhaseMesh, begin: int) -> Iterator[Iterator[StepWork]]:
    """Yield the batches of every step of a phase from `begin` on.

    Those of the next step are built in a thread while this one computes.
    """
    num_steps = run.options.schedule[number].num_steps
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows") as pool:
        def batches() -> Iterator[StepWork]:
            ahead = pool.submit(build_step, run, number, mesh, begin)
            for step in range(begin, num_steps):
                now = ahead
                if step + 1 < num_steps:
                    ahead = pool.submit(build_step, run, number, mesh, step + 1)
                yield now.result()

        yield batches()


def build_step(run: Run, number: int, mesh: PhaseMesh, step: int) -> StepWork:
    """This process's batches of one step: the rows of its group, and its part of each."""
    phase = run.options.schedule[number]
    indices = range(step * phase.batch_rows, (step + 1) * phase.batch_rows)
    costs = [attention_cost(run, number, index) for index in indices]
    kinds = [run.rows.kind(number, index) for index in indices]
    at_once = max(1, _MICRO_TOKENS * mesh.cp // phase.length)
    dealt = join_turns(deal(costs, kinds, mesh.dp), kinds, at_once)
    held = [[_row(run, number, indices[turn[mesh.dp_rank]]) for turn in turns] for turns in dealt]
    batches = [build_batch(rows, layout=run.options.layout, rank=mesh.cp_rank, world=mesh.cp,
                           document_mask=run.options.document_mask,
                           reads_teacher=any(kinds[row].distill for turn in turns for row in turn))
               for rows, turns in zip(held, dealt, strict=True)]
    if run.processes.device.type == "cuda":
        batches = [batch.pin() for batch in batches]
    return StepWork(batches, imbalance(dealt, costs), _digest(held))


def _digest(held: Iterable[Iterable[Row]]) -> int:
    """32 bits of what rows hold and what is predicted of them."""
    digest = 0
    for rows in held:
        for row in rows:
            digest = zlib.crc32(row.labels.data, zlib.crc32(row.input_ids.data, digest))
    return digest


def _row(run: Run, number: int, index: int) -> Row:
    """A row whose tokens the model knows.

    Raises:
        DataError: one that it does not, as with the tokenizer of another model.
    """
    row, vocabulary = run.rows.row(number, index), run.config.vocab_size
    if row.input_ids.max() >= vocabulary:
        raise DataError(f"{row.source}: row {index} of phase {number + 1} has the token "
                        f"{row.input_ids.max()}, but the embeddings of {run.options.model} end at "
                        f"{vocabulary - 1}; give the model its own tokenizer, or more embeddings")
    return row


def attention_cost(run: Run, number: int, index: int) -> int:
    """Twice the pairs of query and key in a row, over all layers."""
    whole = [run.options.schedule[number].length]
    return run.size.squares(run.rows.documents(number, index) if run.options.document_mask
                            else whole)


def train_step(run: Run, number: int, mesh: PhaseMesh, step: int, work: StepWork,
               stopped: threading.Event) -> StepResult:
    """Take one optimizer step.

    Raises:
        TrainingError: the loss or the gradient is bad (`extend.train.bad_steps`), processes that
            share rows read different ones, or there is nothing to learn from.
    """
    phase, device, batches = run.options.schedule[number], run.processes.device, work.batches
    counts = torch.stack([batch.counts() for batch in batches]).sum(0)
    # All ranks of a ring have the same rows, so one of them counts their attention; and of those
    # that compute the same tokens, one counts them.
    counts_tokens = run.processes.tp_rank == 0
    squares = [run.size.squares(batch.documents(mesh.cp)) for batch in batches]
    own = torch.tensor([int(stopped.is_set()),
                        sum(squares) if mesh.cp_rank == 0 and counts_tokens else 0,
                        mesh.dp_rank, work.digest])
    # Over all processes: tokens predicted, in answers and distilled; told to stop; squares.
    told = _gather(run, torch.cat((counts * counts_tokens, own)))
    _check_same_rows(run, number, step, told[:, 5].tolist(), told[:, 6].tolist())
    totals = told[:, :5].sum(0)
    if not totals[0]:
        raise TrainingError(f"step {step + 1} of phase {number + 1}: no token of "
                            f"{_rows(run, number, step)} is predicted; give longer rows, or "
                            "mask_prompt false")
    sums = torch.zeros(4, device=device)
    for batch in batches:
        sums += forward_backward(run, mesh, batch.to(device), totals[:3].to(device))
    norm = clip_gradients(run.module.parameters(), run.options.clip_norm)
    sums = run.processes.sum(sums if counts_tokens else torch.zeros_like(sums))
    loss, nll, answer_nll, divergence, grad_norm = *sums.tolist(), norm.item()
    num_predicted, num_answers, num_distilled, num_told, num_squares = totals.tolist()
    nll = nll / max(num_predicted, 1)
    bad = run.history.judge(number, nll if math.isfinite(loss) else loss, grad_norm,
                            run.options.max_loss_rise)
    if bad is not None:
        bad = meet_bad_step(run, number, mesh, step, bad)
        if run.processes.is_main:
            logger.warning("%s; the step is skipped (bad_loss skip)", bad)
    lr = learning_rate(phase, step)
    set_learning_rate(run.optimizer, lr)
    if run.options.stochastic_rounding:
        seed_rounding(run.options.seed, number, step)
    if bad is None:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.history.add(number, nll, bad is not None)
    metrics = {
        "phase": number + 1, "length": phase.length, "loss": loss,
        "nll": nll,
        "answer_nll": answer_nll / num_answers if num_answers else None,
        "lr": lr, "grad_norm": grad_norm, "attention_imbalance": round(work.imbalance, 4)}
    if num_distilled:
        metrics["divergence"] = divergence * num_predicted / num_distilled
    if bad is not None:
        metrics = finite_or_none(metrics) | {"skipped": bad}
    flops = run.size.flops(phase.batch_rows * phase.length, num_squares)
    return StepResult(metrics, flops, num_told > 0)


def forward_backward(run: Run, mesh: PhaseMesh, batch: Batch, totals: Tensor) -> Tensor:
    """Add the gradients of one batch.

    Returns:
        fp32 [4], this process's share of: the loss, the summed losses of all predicted tokens
        and of answer tokens, and what of the loss is distilled.
    """
    weights = token_weights(batch, totals, run.options.answer_weight)
    loss, nll = run.forward(mesh, batch, weights)
    loss.backward()
    loss = loss.detach()
    return torch.stack((loss, nll.sum(), (nll * batch.answers.flatten()).sum(),
                        loss * batch.kind.distill))


def _gather(run: Run, own: Tensor) -> Tensor:
    """The numbers of all processes, int64 [process, number], on the host."""
    if run.processes.mesh is None:
        return own[None]
    return run.processes.gather(own[None].to(run.processes.device)).cpu()


def _check_same_rows(run: Run, number: int, step: int, groups: list[int],
                     digests: list[int]) -> None:
    """Raise TrainingError when processes that share rows do not read the same ones."""
    for other, rank in find_difference(groups, digests):
        raise TrainingError(
            f"step {step + 1} of phase {number + 1}: processes {other} and {rank} share rows, "
            f"but read different ones (their tokens hash to {digests[other]:08x} and "
            f"{digests[rank]:08x}), of {_rows(run, number, step)}; the data or its cached "
            "tokens are not the same for all: give all hosts the same files, or another "
            "token_cache")


def _rows(run: Run, number: int, step: int) -> str:
    """The rows of a step and where they come from, for messages."""
    rows = run.options.schedule[number].batch_rows
    indices = range(step * rows, (step + 1) * rows)
    sources = sorted({run.rows.row(number, index).source for index in indices})
    return f"rows {indices[0]} to {indices[-1]} of {', '.join(sources)}"
