"""Rows that compare a model with a reference, token by token, without all logits at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from extend.evaluate.backends.backend import Backend
from extend.evaluate.forward import HEAD_ROWS
from extend.evaluate.frame import Frame
from extend.evaluate.measures.capability import require
from extend.evaluate.measures.row import DIGITS, describe_prompts
from extend.evaluate.score import mean_and_error
from extend.evaluate.tasks.loss import Divergence
from extend.evaluate.tasks.task import Cell
from extend.evaluate.tasks.vocabulary import shared_vocabulary


def divergence(backend: Backend, frame: Frame, task: Divergence, cells: Sequence[Cell],
               seed: int) -> list[dict[str, Any]]:
    """Loss of both, KL(reference || model) and how often their first choices agree.

    Means over windows that are equally long, with the standard errors of their differences. The
    difference of the losses has an error of its own: both read the same text.
    """
    rows = []
    for cell in cells:
        local = require(backend, cell, "row_states", "model", "reference")
        prompts = task.prompts(frame, cell, seed)
        reference = local.reference(task.reference)
        width = _width(local, reference, shared_vocabulary(frame.tokenizer, task.reference,
                                                           cell.name))
        means = compare(local, reference, [prompt.ids for prompt in prompts], width)
        rows.append({**describe_prompts(cell, prompts, seed), **_describe(means),
                     "tokens": sum(prompt.answer_len for prompt in prompts), "score": None,
                     "reference": task.reference, "vocabulary": width})
    return rows


def _width(backend: Any, reference: Any, shared: int | None) -> int:
    """Rows of the output heads that are compared."""
    widths = [len(side.model.get_output_embeddings().weight) for side in (backend, reference)]
    return min([*widths, *([] if shared is None else [shared])])


@torch.inference_mode()
def compare(backend: Any, reference: Any, rows: Sequence[Sequence[int]],
            width: int) -> dict[str, np.ndarray]:
    """Means over each row's tokens but its first: [rows] of every number in the result.

    Args:
        backend, reference: with `model` and `row_states`.
        rows: token ids.
        width: the first so many tokens of the vocabulary are compared.
    """
    sums = torch.zeros(4, len(rows), dtype=torch.float64)
    heads = [side.model.get_output_embeddings() for side in (backend, reference)]
    for own, theirs in zip(backend.row_states(rows), reference.row_states(rows), strict=True):
        i, begin, hidden = own
        wanted = torch.as_tensor(rows[i][begin + 1:begin + 1 + len(hidden)], device=hidden.device)
        for first in range(0, len(wanted), HEAD_ROWS):
            part = slice(first, min(first + HEAD_ROWS, len(wanted)))
            logits = [head(states[part])[:, :width] for head, states in
                      zip(heads, (hidden, theirs[2]), strict=True)]
            sums[:, i] += _sums(*logits, wanted[part]).cpu()
    counts = np.array([len(row) - 1 for row in rows])
    names = ("loss", "reference_loss", "kl", "agreement")
    return {name: total.numpy() / counts for name, total in zip(names, sums, strict=True)}


def _sums(logits: Tensor, reference_logits: Tensor, wanted: Tensor) -> Tensor:
    """Sums over positions, fp64 [4]: both losses, KL and agreement of logits [n, vocab]."""
    own, theirs = (functional.log_softmax(x.float(), dim=-1) for x in (logits, reference_logits))
    values = (functional.nll_loss(own, wanted, reduction="none"),
              functional.nll_loss(theirs, wanted, reduction="none"),
              (theirs.exp() * (theirs - own)).sum(dim=-1),
              (own.argmax(dim=-1) == theirs.argmax(dim=-1)).float())
    return torch.stack(values).double().sum(dim=1)


def _describe(means: dict[str, np.ndarray]) -> dict[str, Any]:
    means = {**means, "difference": means["loss"] - means["reference_loss"]}
    found: dict[str, Any] = {"n": len(means["loss"])}
    for name, values in means.items():
        mean, error = mean_and_error(values.tolist())
        found[name] = round(mean, DIGITS)
        label = "stderr" if name == "loss" else f"{name}_stderr"
        found[label] = None if error is None else round(error, DIGITS)
    return found
