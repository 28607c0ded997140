"""Exact match, loss and KL of a model's answers, by one forward over prompt and answer.

Greedy decoding writes an answer exactly when every token of it is the model's first choice given
the right tokens before it, so no text is generated.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from extend.evaluate.frame import Frame
from extend.evaluate.tasks.exact_match import ExactMatch
from extend.evaluate.tasks.task import Cell, Prompt
from extend.haystack import encode

HEAD_ROWS = 2048  # positions whose logits exist at once


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, and the positions in them whose next token is asked for.

    Attributes:
        ids: [r, s].
        rows, columns: [n], where hidden states are read.
        targets: [n], the token after each.
        owners: [n], number of the prompt a position belongs to, within the batch.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    owners: Tensor

    @property
    def count(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Score:
    """What a model makes of a list of batches.

    Attributes:
        right: prompts whose every asked token is the first choice.
        count: prompts.
        loss: mean over asked tokens, nats.
        kl: mean over asked tokens of KL(reference || this), nats; None without a reference.
    """

    right: int
    count: int
    loss: float
    kl: float | None


def read_examples(tokenizer: Any, path: Path, limit: int | None = None) -> list[Prompt]:
    """Token ids of a skill's examples."""
    cell = Cell("skill", "exact-match", None, None, limit or 0)
    return ExactMatch(file=str(path), limit=limit).prompts(Frame.of(tokenizer), cell, seed=0)


def make_batch(prompts: Sequence[Prompt], device: torch.device) -> Batch:
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    rows, columns = [], []
    for i, prompt in enumerate(prompts):
        ids[i, :len(prompt.ids)] = torch.tensor(prompt.ids)
        first = len(prompt.ids) - prompt.answer_len - 1
        rows += [i] * prompt.answer_len
        columns += range(first, first + prompt.answer_len)
    at = torch.tensor(rows), torch.tensor(columns)
    targets = ids[at[0], at[1] + 1]
    return Batch(*(t.to(device) for t in (ids, *at, targets, at[0])))


def make_batches(prompts: Sequence[Prompt], tokens: int, device: torch.device) -> list[Batch]:
    """Prompts of like lengths together, at most `tokens` with padding in one forward."""
    batches, group = [], []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
        if group and len(prompt.ids) * (len(group) + 1) > tokens:
            batches.append(make_batch(group, device))
            group = []
        group.append(prompt)
    return [*batches, make_batch(group, device)] if group else batches


def text_batches(tokenizer: Any, paths: Sequence[Path], *, windows: int, length: int, stride: int,
                 tokens: int, device: torch.device) -> list[Batch]:
    """Windows of `length` tokens, evenly spread over the texts; every stride-th token is asked."""
    ids = [i for path in paths for i in encode(tokenizer, path.read_text(encoding="utf-8"))]
    starts = [round(k * (len(ids) - length) / max(1, windows - 1)) for k in range(windows)]
    cut, batches = torch.tensor([ids[s:s + length] for s in starts]), []
    columns = torch.arange(stride - 1, length - 1, stride)
    for part in cut.split(max(1, tokens // length)):
        rows = torch.arange(len(part)).repeat_interleave(len(columns))
        at = rows, columns.repeat(len(part))
        batches.append(Batch(*(t.to(device) for t in
                               (part, *at, part[at[0], at[1] + 1], rows))))
    return batches


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 on a GPU, nothing on the CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@torch.inference_mode()
def log_probs(model: PreTrainedModel, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the asked positions with their log probabilities, fp32 [m, vocabulary]."""
    with autocast(batch.ids.device):
        hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
        states = hidden[batch.rows, batch.columns]
        for begin in range(0, len(states), HEAD_ROWS):
            part = slice(begin, begin + HEAD_ROWS)
            logits = model.get_output_embeddings()(states[part])
            yield part, functional.log_softmax(logits.float(), dim=-1)


def keep_reference(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Log probabilities of every batch, to compare another state of the model with."""
    return [torch.cat([found for _, found in log_probs(model, batch)]) for batch in batches]


@torch.inference_mode()
def score(model: PreTrainedModel, batches: Sequence[Batch],
          reference: Sequence[Tensor] | None = None) -> Score:
    """Score the asked tokens of all batches."""
    right = count = tokens = 0
    loss = kl = torch.zeros((), dtype=torch.float64, device=batches[0].ids.device)
    for k, batch in enumerate(batches):
        wrong = torch.zeros(batch.count, dtype=torch.int64, device=batch.ids.device)
        for part, found in log_probs(model, batch):
            targets = batch.targets[part]
            misses = (found.argmax(-1) != targets).long()
            wrong.index_add_(0, batch.owners[part], misses)
            loss = loss - found.gather(1, targets[:, None]).double().sum()
            if reference is not None:
                known = reference[k][part]
                kl = kl + (known.exp() * (known - found)).sum(-1).double().sum()
        right += int((wrong == 0).sum())
        count, tokens = count + batch.count, tokens + len(batch.targets)
    return Score(right, count, float(loss) / tokens,
                 None if reference is None else float(kl) / tokens)
