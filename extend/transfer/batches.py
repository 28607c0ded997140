"""Rows as tensors: padded together on the right, where a causal model cannot see the pads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from extend.errors import DataError
from extend.transfer.rows import Row


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA, where matrix products and attention are fast in it; none on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def group_by_tokens(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of rows, shortest first, in groups of at most `most` tokens with padding."""
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        if group and sizes[i] * (len(group) + 1) > most:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together.

    Attributes:
        ids: int64 [b, s], 0 after the end of a row.
        rows, columns: int64 [n], where the hidden state lies that predicts each scored token.
        labels: int64 [n], the scored tokens.
        states: [n, d], a teacher's last hidden states at these places; None where the labels
            themselves are to be learnt.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    states: Tensor | None = None


def make_batches(rows: Sequence[Row], device: torch.device, *, most: int = 8192) -> list[Batch]:
    """Batches of at most `most` tokens, or of one longer row.

    Raises:
        DataError: a row of which nothing is scored.
    """
    groups = group_by_tokens([len(row.ids) for row in rows], most)
    return [_batch([rows[i] for i in group], device) for group in groups]


def _batch(rows: Sequence[Row], device: torch.device) -> Batch:
    ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.int64)
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, :len(row.ids)] = torch.tensor(row.ids)
        scored[i, 1:len(row.ids)] = torch.tensor(row.scored[1:], dtype=torch.bool)
        if not bool(scored[i].any()):
            raise DataError(f"a row of {len(row.ids)} tokens has none that counts; give prompts "
                            "that the target answers")
    where, columns = scored.nonzero(as_tuple=True)
    return Batch(ids.to(device), where.to(device), (columns - 1).to(device),
                 ids[scored].to(device))


def scored_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states [n, d], each where a scored token is predicted."""
    hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden[batch.rows, batch.columns]


@torch.no_grad()
def taught(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with the states of this model, the teacher, as it is now."""
    with autocast(model.device):
        return [replace(batch, states=scored_states(model, batch)) for batch in batches]
