"""Score answers by teacher forcing: one forward of prompt and answer, no generation.

Every answer token is the model's first choice given what precedes it exactly when greedy
generation would write the answer, so one prefill replaces a prefill and a decode. Logits are
computed for answer positions only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from extend.errors import CompatibilityError
from extend.evaluate.tasks.task import Prompt
from extend.loading import cache_argument
from extend.model_config import depends_on_length

HEAD_ROWS = 512  # positions whose logits exist at once: 0.3 GiB in fp32 at 150,000 tokens
_HEAD_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier")


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What a model makes of one answer.

    Attributes:
        predicted: its first choice at each answer position, given the right tokens before it.
        correct: whether all of them are right.
        nll: sum over the answer of the negative log-likelihoods, in nats.
    """

    predicted: list[int]
    correct: bool
    nll: float


@torch.inference_mode()
def score_answers(model: PreTrainedModel, prompts: Sequence[Prompt], *,
                  chunk: int) -> list[AnswerScore]:
    """Score each prompt's answer.

    Args:
        prompts: rows of any lengths; short ones are batched, with padding on the right, which a
            causal model cannot see.
        chunk: most tokens in one forward; a longer row goes through a KV cache in parts.

    Raises:
        CompatibilityError: the model changes its logits after the output head.
    """
    _check_head(model)
    scores: dict[int, AnswerScore] = {}
    for batch in _batches(prompts, chunk):
        rows = [prompts[i] for i in batch]
        hidden = _answer_states(model, rows, chunk)
        scores.update(zip(batch, _read_answers(model, hidden, rows), strict=True))
    return [scores[i] for i in range(len(prompts))]


def _check_head(model: PreTrainedModel) -> None:
    for key in _HEAD_CHANGES:
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            raise CompatibilityError(f"{model.config.model_type}: {key} changes the logits after "
                                     "the output head, which evaluation does not compute yet")


def _batches(prompts: Sequence[Prompt], chunk: int) -> Iterator[list[int]]:
    """Indices of prompts, shortest first, in groups of at most `chunk` tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i)):
        if batch and len(prompts[i].ids) * (len(batch) + 1) > chunk:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _answer_states(model: PreTrainedModel, rows: Sequence[Prompt], chunk: int) -> Tensor:
    """Last hidden states [all answer tokens, hidden_size], each where its token is predicted."""
    if len(rows) == 1 and len(rows[0].ids) > chunk:
        return _chunked_states(model, rows[0], chunk)
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, :len(row.ids)] = torch.tensor(row.ids)
    hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return torch.cat([hidden[i, len(row.ids) - row.answer_len - 1:len(row.ids) - 1]
                      for i, row in enumerate(rows)])


def _chunked_states(model: PreTrainedModel, row: Prompt, chunk: int) -> Tensor:
    """The same for one row that is too long for one forward."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if depends_on_length(rope):
        raise CompatibilityError(f"RoPE of type {rope['rope_type']!r} changes with the length, so "
                                 f"a row of {len(row.ids)} tokens cannot be read in parts of "
                                 f"{chunk}; raise chunk to that length")
    total = len(row.ids)
    ids = torch.tensor([row.ids], device=model.device)
    size = -(-total // -(-total // chunk))  # equal parts
    first, cache, kept = total - row.answer_len - 1, DynamicCache(config=model.config), []
    argument = cache_argument(model.base_model)
    for begin in range(0, total, size):
        hidden = model.base_model(input_ids=ids[:, begin:begin + size], use_cache=True,
                                  **{argument: cache}).last_hidden_state[0]
        kept.append(hidden[max(0, first - begin):max(0, total - 1 - begin)].clone())
    return torch.cat(kept)


def _read_answers(model: PreTrainedModel, hidden: Tensor,
                  rows: Sequence[Prompt]) -> list[AnswerScore]:
    wanted = torch.tensor([t for row in rows for t in row.ids[-row.answer_len:]],
                          device=hidden.device)
    head, choices, losses = model.get_output_embeddings(), [], []
    for states, targets in zip(hidden.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True):
        logits = head(states).float()
        choices.append(logits.argmax(dim=-1))
        losses.append(functional.cross_entropy(logits, targets, reduction="none"))
    right = torch.cat(choices) == wanted
    lengths = [row.answer_len for row in rows]
    parts = zip(torch.cat(choices).split(lengths), right.split(lengths),
                torch.cat(losses).double().split(lengths), strict=True)
    return [AnswerScore(choice.tolist(), bool(ok.all()), float(nll.sum()))
            for choice, ok, nll in parts]
