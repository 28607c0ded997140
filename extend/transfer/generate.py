"""Let a model go on from prompts: greedily, which is its answer, or by sampling.

Prompts of one batch are padded on the left, so that all end where the next token is written. The
pads are masked and positions are counted from the first real token, so each row is computed as if
it stood alone, up to the order in which the device adds numbers.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from extend.loading import cache_argument
from extend.transfer.batches import autocast, group_by_tokens

Choose = Callable[[Tensor], Tensor]
"""Logits fp32 [b, v] -> the next token of each row, int64 [b]."""


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def sampler(seed: int) -> Choose:
    """Draw from the model's own distribution; on the CPU, so that devices draw alike."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        shares = logits.softmax(dim=-1).cpu()
        return torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)

    return choose


@torch.no_grad()
def continue_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_new: int,
                     stop: Collection[int], choose: Choose = greedy,
                     batch_tokens: int = 16384) -> list[list[int]]:
    """Token ids that the model writes after each prompt.

    Args:
        prompts: token ids, at least one each.
        max_new: most tokens to write.
        stop: ids that end a continuation; they belong to it.
        batch_tokens: most tokens of prompts and continuations that are computed together.
    """
    written: dict[int, list[int]] = {}
    sizes = [len(prompt) + max_new for prompt in prompts]
    with autocast(model.device):
        for batch in group_by_tokens(sizes, batch_tokens):
            rows = _continue(model, [prompts[i] for i in batch], max_new, frozenset(stop), choose)
            written.update(zip(batch, rows, strict=True))
    return [written[i] for i in range(len(prompts))]


def _continue(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new: int,
              stop: frozenset[int], choose: Choose) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for tokens in _tokens(model, prompts, max_new, choose):
        for row in list(open_rows):
            rows[row].append(tokens[row])
            if tokens[row] in stop:
                open_rows.remove(row)
        if not open_rows:
            break
    return rows


def _tokens(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new: int,
            choose: Choose) -> Iterator[list[int]]:
    """The next token of every row, step by step; rows that have ended go on unheard."""
    longest, device = max(map(len, prompts)), model.device
    pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)[:, None]
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    seen = torch.arange(longest + max_new, device=device)[None] >= pads
    positions = torch.arange(longest, device=device)[None].sub(pads).clamp(min=0)
    cache, argument = DynamicCache(config=model.config), cache_argument(model)
    for end in range(longest, longest + max_new):
        mask = seen[:, :end].long() if bool(pads.any()) else None
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                       logits_to_keep=1, **{argument: cache}).logits[:, -1].float()
        ids = choose(logits)[:, None]
        positions = positions[:, -1:] + 1
        yield ids[:, 0].tolist()
