"""Greedy generation: every prompt is read on its own, then all go on together.

Reading takes no padding and no mask, so a prompt's keys are those of a forward of it alone. For
the tokens that follow, caches are laid side by side, aligned at their ends.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from extend.evaluate.attention import decoding
from extend.evaluate.backends.backend import Generation
from extend.evaluate.cache import make_cache
from extend.evaluate.forward import check_head, hidden_parts
from extend.evaluate.tasks.task import Prompt
from extend.loading import cache_argument

_SHARE = 0.5  # of a GPU's memory that caches of a batch may take


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], *,
             chunk: int) -> list[Generation]:
    """Let the model write its first choices after each prompt.

    Args:
        prompts: each with `max_new_tokens` of at least 1.
        chunk: most tokens in one forward; a longer prompt is read in parts. Caches of as many
            tokens are held side by side, and of more where a GPU has memory for them.

    Raises:
        CompatibilityError: the model changes its logits after the output head, or its RoPE
            changes with the length.
    """
    check_head(model)
    ends = end_tokens(model, tokenizer)
    written: dict[int, Generation] = {}
    for batch in _batches(prompts, max(chunk, _held_tokens(model))):
        rows = [prompts[i] for i in batch]
        ids = _go_on(model, *_read(model, rows, chunk), rows, ends)
        written.update(zip(batch, (finish(tokenizer, row, some, ends)
                                   for row, some in zip(rows, ids, strict=True)), strict=True))
    return [written[i] for i in range(len(prompts))]


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: the generation config's and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    known = getattr(config, "eos_token_id", None)
    ids = known if isinstance(known, list) else [known]
    return frozenset(i for i in [*ids, getattr(tokenizer, "eos_token_id", None)] if i is not None)


def finish(tokenizer: Any, prompt: Prompt, ids: Sequence[int],
           ends: frozenset[int]) -> Generation:
    """What a row wrote within its own budget, up to its end token."""
    ids = list(ids[:prompt.max_new_tokens])
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids[:end]
    return Generation(kept, tokenizer.decode(kept, skip_special_tokens=True), end is not None)


def _held_tokens(model: PreTrainedModel) -> int:
    """Tokens whose keys and values take half of the GPU's memory; 0 without a GPU."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if model.device.type != "cuda" or heads is None:
        return 0
    memory = torch.cuda.get_device_properties(model.device).total_memory
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return int(_SHARE * memory) // token


def _batches(prompts: Sequence[Prompt], held: int) -> Iterator[list[int]]:
    """Indices of prompts, longest first, whose padded caches hold at most `held` tokens."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: (-prompts[i].length, i)):
        if batch and prompts[batch[0]].length * (len(batch) + 1) > held:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _read(model: PreTrainedModel, rows: Sequence[Prompt],
          chunk: int) -> tuple[DynamicCache, Tensor]:
    """The joined cache, and the states [rows, hidden_size] that choose the first new tokens."""
    caches, states = [], []
    for row in rows:
        # A row that goes on alone does so in the cache it was read into.
        cache = make_cache(model, row.length if len(rows) == 1 else len(row.ids))
        for _, hidden in hidden_parts(model, row.ids, chunk=chunk, cache=cache):
            last = hidden[-1]
        caches.append(cache)
        states.append(last.clone())
    room = max(len(row.ids) for row in rows) + max(row.max_new_tokens for row in rows)
    return _join(model, caches, room), torch.stack(states)


def _join(model: PreTrainedModel, caches: Sequence[DynamicCache], room: int) -> DynamicCache:
    """One cache of all rows; shorter ones are padded on the left, layer by layer."""
    if len(caches) == 1:
        return caches[0]
    joined = make_cache(model, room)
    for index in range(len(caches[0].layers)):
        layers = [cache.layers[index] for cache in caches]
        longest = max(layer.keys.shape[-2] for layer in layers)
        joined.update(*(_pad([getattr(layer, name) for layer in layers], longest)
                        for name in ("keys", "values")), index)
        for cache in caches:  # held twice for one layer only
            cache.layers[index] = None
        del layers
    return joined


def _pad(tensors: Sequence[Tensor], length: int) -> Tensor:
    """Tensors [1, h, n, d] as one [rows, h, length, d], aligned at their ends."""
    first = tensors[0]
    out = first.new_zeros(len(tensors), first.shape[1], length, first.shape[3])
    for row, tensor in zip(out, tensors, strict=True):
        row[:, length - tensor.shape[-2]:] = tensor[0]
    return out


def _go_on(model: PreTrainedModel, cache: DynamicCache, states: Tensor, rows: Sequence[Prompt],
           ends: frozenset[int]) -> list[list[int]]:
    """New tokens of each row, until all rows have ended or used their budgets."""
    head, argument = model.get_output_embeddings(), cache_argument(model.base_model)
    seen = torch.tensor([len(row.ids) for row in rows], device=model.device)
    budgets = torch.tensor([row.max_new_tokens for row in rows], device=model.device)
    last_ids = torch.tensor(sorted(ends), dtype=torch.int64, device=model.device)
    written: list[Tensor] = []
    done = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    while True:
        tokens = head(states).float().argmax(dim=-1)
        written.append(tokens)
        done |= torch.isin(tokens, last_ids) | (budgets <= len(written))
        if done.all():
            return torch.stack(written, dim=1).tolist()
        with decoding(seen + 1):
            states = model.base_model(input_ids=tokens[:, None], position_ids=seen[:, None],
                                      use_cache=True, **{argument: cache}
                                      ).last_hidden_state[:, -1]
        seen = seen + 1
