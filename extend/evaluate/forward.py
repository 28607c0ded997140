"""Score answers by teacher forcing: one forward of prompt and answer, no generation.

Every answer token is the model's first choice given what precedes it exactly when greedy
generation would write the answer, so one prefill replaces a prefill and a decode. Logits are
computed for answer positions only.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from extend.errors import CompatibilityError
from extend.evaluate.backends.backend import AnswerScore
from extend.evaluate.cache import make_cache
from extend.evaluate.fork import Fork
from extend.evaluate.tasks.task import Prompt
from extend.loading import cache_argument
from extend.model_config import depends_on_length

HEAD_ROWS = 512  # positions whose logits exist at once: 0.3 GiB in fp32 at 150,000 tokens
_HEAD_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier")


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
    check_head(model)
    scores: dict[int, AnswerScore] = {}
    for batch in _batches([prompt.ids for prompt in prompts], chunk):
        rows = [prompts[i] for i in batch]
        states = [torch.cat(kept) for kept in _answer_states(model, rows, chunk)]
        scores.update(zip(batch, _read_answers(model, states, rows), strict=True))
    return [scores[i] for i in range(len(prompts))]


@torch.inference_mode()
def score_after(model: PreTrainedModel, cache: DynamicCache, prompts: Sequence[Prompt], *,
                chunk: int) -> list[AnswerScore]:
    """Score answers that each follow the one row in a cache; the cache stays as it is.

    Args:
        cache: of one row, as `hidden_parts` fills it.
        prompts: what follows the row, question and answer; none sees another.
        chunk: most tokens in one forward.

    Raises:
        CompatibilityError: the model changes its logits after the output head, or it keeps
            something other than keys and values in its cache.
    """
    check_head(model)
    scores: dict[int, AnswerScore] = {}
    for batch in _batches([prompt.ids for prompt in prompts], chunk):
        rows = [prompts[i] for i in batch]
        with Fork(cache).shared() as fork:
            hidden = model.base_model(input_ids=_pad([row.ids for row in rows]).to(model.device),
                                      use_cache=True, **{cache_argument(model.base_model): fork}
                                      ).last_hidden_state
        states = [hidden[i, len(row.ids) - row.answer_len - 1:len(row.ids) - 1]
                  for i, row in enumerate(rows)]
        scores.update(zip(batch, _read_answers(model, states, rows), strict=True))
    return [scores[i] for i in range(len(prompts))]


@torch.inference_mode()
def token_losses(model: PreTrainedModel, rows: Sequence[Sequence[int]], *, chunk: int,
                 last: Sequence[int] | None = None) -> list[np.ndarray]:
    """The losses of each row's tokens but its first: fp32 [len - 1], in nats.

    Args:
        rows, chunk: as in `score_answers`.
        last: of each row, how many of its last tokens are scored instead: fp32 [that many].

    Raises:
        CompatibilityError: the model changes its logits after the output head.
    """
    counts = [len(row) - 1 for row in rows] if last is None else last
    found = [np.empty(count, dtype=np.float32) for count in counts]
    for i, begin, hidden in row_states(model, rows, chunk=chunk):
        before = len(rows[i]) - 1  # states that predict a token of the row
        first = before - counts[i]
        low, high = max(first, begin), min(before, begin + len(hidden))
        if low < high:
            _, losses = read_head(model, hidden[low - begin:high - begin],
                                  rows[i][low + 1:high + 1])
            found[i][low - first:high - first] = losses.cpu().numpy()
    return found


@torch.inference_mode()
def row_states(model: PreTrainedModel, rows: Sequence[Sequence[int]], *,
               chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """Read rows, short ones together; models with the same chunk yield in the same order.

    Yields:
        The index of a row, that of a part's first token in it, and the part's last hidden states
        [n, hidden_size].

    Raises:
        CompatibilityError: the model changes its logits after the output head.
    """
    check_head(model)
    for batch in _batches(rows, chunk):
        for i, begin, hidden in _states(model, [rows[i] for i in batch], chunk):
            yield batch[i], begin, hidden


@torch.inference_mode()
def hidden_parts(model: PreTrainedModel, ids: Sequence[int], *, chunk: int,
                 cache: DynamicCache | None = None) -> Iterator[tuple[int, Tensor]]:
    """Read one row, in equal parts of at most `chunk` tokens.

    Args:
        cache: keys and values of what precedes the row; those of the row are added. Without one,
            a cache of its own serves rows of several parts.

    Yields:
        The index in `ids` of a part's first token, and its last hidden states [n, hidden_size].

    Raises:
        CompatibilityError: the RoPE changes with the length, and the row does not fit one part.
    """
    total = len(ids)
    if cache is not None or total > chunk:
        refuse_growing_rope(model, f"a row of {total} tokens cannot be read in parts of {chunk} or "
                            "on top of a cache; raise chunk to that length, and take tasks with "
                            "known answers and a row for each")
    if cache is None and total > chunk:
        cache = make_cache(model, total)
    arguments = {"use_cache": False} if cache is None else {
        "use_cache": True, cache_argument(model.base_model): cache}
    row = torch.as_tensor(ids, dtype=torch.int64, device=model.device)[None]
    size = -(-total // -(-total // chunk))  # equal parts
    for begin in range(0, total, size):
        part = row[:, begin:begin + size]
        yield begin, model.base_model(input_ids=part, **arguments).last_hidden_state[0]


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than its head's.

    Raises:
        CompatibilityError: naming the key.
    """
    for key in _HEAD_CHANGES:
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            raise CompatibilityError(f"{model.config.model_type}: {key} changes the logits after "
                                     "the output head, which evaluation does not compute yet")


def _batches(rows: Sequence[Sequence[int]], chunk: int) -> Iterator[list[int]]:
    """Indices of rows, shortest first, in groups of at most `chunk` tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i]), i)):
        if batch and len(rows[i]) * (len(batch) + 1) > chunk:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _states(model: PreTrainedModel, rows: Sequence[Sequence[int]],
            chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """(row, index of its first token, last hidden states [n, hidden_size]) of a batch."""
    if len(rows) == 1:
        yield from ((0, begin, part) for begin, part in hidden_parts(model, rows[0], chunk=chunk))
        return
    ids = _pad(rows).to(model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    yield from ((i, 0, hidden[i, :len(row)]) for i, row in enumerate(rows))


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows as one int64 tensor, with zeros on the right, which a causal model cannot see."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.as_tensor(row)
    return ids


def _answer_states(model: PreTrainedModel, rows: Sequence[Prompt],
                   chunk: int) -> list[list[Tensor]]:
    """Of each row the last hidden states [answer_len, hidden_size] that predict its answer."""
    kept: list[list[Tensor]] = [[] for _ in rows]
    for i, begin, hidden in _states(model, [row.ids for row in rows], chunk):
        last = len(rows[i].ids) - 1
        first = last - rows[i].answer_len
        kept[i].append(hidden[max(0, first - begin):max(0, last - begin)].clone())
    return kept


def refuse_growing_rope(model: PreTrainedModel, consequence: str) -> None:
    """Refuse a model whose keys differ with the length of what is read, so that none can be kept.

    Raises:
        CompatibilityError: saying the consequence.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    if depends_on_length(rope):
        kinds = {entry["rope_type"] for entry in (rope, *rope.values())
                 if isinstance(entry, dict) and "rope_type" in entry}
        raise CompatibilityError(f"RoPE of type {', '.join(map(repr, sorted(kinds)))} changes "
                                 f"with the length, so {consequence}")


def read_head(model: PreTrainedModel, hidden: Tensor,
              wanted: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """First choices and losses [n] where hidden states [n, hidden_size] predict `wanted` [n]."""
    targets = torch.as_tensor(wanted, dtype=torch.int64, device=hidden.device)
    head, choices, losses = model.get_output_embeddings(), [], []
    for states, some in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = head(states).float()
        choices.append(logits.argmax(dim=-1))
        losses.append(functional.cross_entropy(logits, some, reduction="none"))
    return torch.cat(choices), torch.cat(losses)


def _read_answers(model: PreTrainedModel, states: Sequence[Tensor],
                  rows: Sequence[Prompt]) -> list[AnswerScore]:
    wanted = torch.tensor([t for row in rows for t in row.ids[-row.answer_len:]])
    choices, losses = read_head(model, torch.cat(list(states)), wanted)
    right = choices.cpu() == wanted
    lengths = [row.answer_len for row in rows]
    parts = zip(choices.cpu().split(lengths), right.split(lengths),
                losses.double().split(lengths), strict=True)
    return [AnswerScore(choice.tolist(), bool(ok.all()), float(nll.sum()))
            for choice, ok, nll in parts]
