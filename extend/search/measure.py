"""One candidate measured: needle answers, short text, siblings. Values item by item.

Logits exist for the answers' tokens only, and for short text in chunks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from extend.model_config import RopeSpec
from extend.search.data import SplitData
from extend.search.models import SearchedModel
from extend.search.needles import NeedleRow

_FORWARD_TOKENS = 65536  # tokens of short rows in one forward
_LOGIT_VALUES = 2 ** 27  # logits that exist at once, fp32


@dataclass(frozen=True, slots=True)
class Items:
    """What one candidate gives on one half of the data; nats.

    Attributes:
        needle: mean loss of a fact's answer tokens, for each fact of each row.
        short_loss: mean loss of each window.
        short_kl: mean KL(native || candidate) of each window.
        siblings: name -> mean KL(own RoPE || candidate) of each window.
    """

    needle: list[float]
    short_loss: list[float] = field(default_factory=list)
    short_kl: list[float] = field(default_factory=list)
    siblings: dict[str, list[float]] = field(default_factory=dict)


class Meter:
    """Measures RoPEs on a model, its siblings, and fixed data.

    Args:
        target_len: tokens; the length that configs are written for.
    """

    def __init__(self, base: SearchedModel, siblings: dict[str, SearchedModel],
                 splits: dict[str, SplitData], target_len: int):
        self.base, self.siblings, self.splits = base, siblings, splits
        self.target_len = target_len
        self._native: dict[tuple[str, str], list[Tensor]] = {}

    @torch.inference_mode()
    def needle(self, rope: RopeSpec, length: int, split: str) -> list[float]:
        """Mean loss of each answer, rows in order, facts in the order of their depths."""
        self.base.use(rope, max(length, self.target_len))
        rows = self.splits[split].rows(length)
        batch = max(1, _FORWARD_TOKENS // length)
        return [loss for begin in range(0, len(rows), batch)
                for loss in _answer_losses(self.base.model, rows[begin:begin + batch])]

    @torch.inference_mode()
    def short(self, rope: RopeSpec, split: str) -> tuple[list[float], list[float]]:
        """Loss and KL(native || rope) of each native-length window."""
        return self._compare("", self.base, self.splits[split].short, rope, split)

    @torch.inference_mode()
    def disturbance(self, rope: RopeSpec, split: str) -> dict[str, list[float]]:
        """Sibling -> KL(own || rope) of each of its windows."""
        return {name: self._compare(name, sibling, self.splits[split].siblings[name], rope,
                                    split)[1] for name, sibling in self.siblings.items()}

    def _compare(self, name: str, model: SearchedModel, windows: Tensor, rope: RopeSpec,
                 split: str) -> tuple[list[float], list[float]]:
        batch = max(1, _FORWARD_TOKENS // windows.shape[1])
        parts = windows.to(model.model.device).split(batch)
        if (name, split) not in self._native:
            model.use(model.own, self.target_len)
            self._native[name, split] = [_hidden(model.model, part) for part in parts]
        model.use(rope, self.target_len)
        losses: list[float] = []
        divergences: list[float] = []
        for part, native in zip(parts, self._native[name, split], strict=True):
            loss, kl = _losses_and_kl(model.model, native, _hidden(model.model, part), part)
            losses += loss.tolist()
            divergences += kl.tolist()
        return losses, divergences


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states [b, s, hidden_size]."""
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def _head(model: Any) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return head.weight.float(), None if bias is None else bias.float()


def _answer_losses(model: Any, rows: list[NeedleRow]) -> list[float]:
    ids = torch.tensor([row.ids for row in rows], device=model.device)
    hidden = _hidden(model, ids)
    places = [(i, span) for i, row in enumerate(rows) for span in row.answers]
    states = torch.cat([hidden[i, low - 1:high - 1] for i, (low, high) in places])
    targets = torch.cat([ids[i, low:high] for i, (low, high) in places])
    logits = functional.linear(states.float(), *_head(model))
    losses = functional.cross_entropy(logits, targets, reduction="none").double()
    return [float(part.mean()) for part in losses.split([high - low for _, (low, high) in places])]


def _losses_and_kl(model: Any, native: Tensor, hidden: Tensor,
                   ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and mean KL(native || hidden) of each row, fp64 [b]; all but the last position."""
    weight, bias = _head(model)
    chunk = max(1, _LOGIT_VALUES // weight.shape[0])
    rows, length = ids.shape
    targets = ids[:, 1:].flatten()
    states = [h[:, :-1].flatten(0, 1) for h in (native, hidden)]
    losses, divergences = [], []
    for begin in range(0, len(targets), chunk):
        part = slice(begin, begin + chunk)
        before, after = (functional.linear(s[part].float(), weight, bias).log_softmax(-1)
                         for s in states)
        losses.append(-after.gather(1, targets[part, None]).squeeze(1))
        divergences.append((before.exp() * (before - after)).sum(-1))
    return tuple(torch.cat(values).double().view(rows, length - 1).mean(1)
                 for values in (losses, divergences))
