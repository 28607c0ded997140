"""What a transfer must keep and must gain, as losses: the target's answers, and the long context.

Shapes: n scored tokens, d hidden, v vocabulary. Losses are in nats, in fp32.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from extend.errors import CompatibilityError
from extend.transfer.batches import Batch, autocast, scored_states

_HEAD_ROWS = 512  # tokens whose logits exist at once: 0.3 GiB in fp32 at 150,000 tokens
_LOGIT_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier")


class Head(NamedTuple):
    """The output head: [v, d], and [v] or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head as it is now; its gradient flows.

        Raises:
            CompatibilityError: a model that changes its logits after the head.
        """
        for key in _LOGIT_KEYS:
            if getattr(model.config, key, None) not in (None, 1, 1.0):
                raise CompatibilityError(f"{model.config.model_type}: {key} is "
                                         f"{getattr(model.config, key)}; only models with a plain "
                                         "output head are supported here")
        head = model.get_output_embeddings()
        return cls(head.weight, getattr(head, "bias", None))

    def frozen(self) -> "Head":
        """A copy that changes of the model do not reach."""
        return Head(*(None if x is None else x.detach().clone() for x in self))

    def logits(self, states: Tensor) -> Tensor:
        """fp32 [n, v]."""
        return functional.linear(states.to(self.weight.dtype), self.weight, self.bias).float()


@dataclass(frozen=True)
class Lesson:
    """What is learnt from and, in the other half, what is judged by.

    Attributes:
        answers, judged_answers: the target's own answers with its hidden states, on short prompts.
        long, judged_long: rows of the long length whose labels are the hidden facts.
        head: of the target.
    """

    answers: list[Batch]
    judged_answers: list[Batch]
    long: list[Batch]
    judged_long: list[Batch]
    head: Head


def token_losses(model: PreTrainedModel, batch: Batch, teacher: Head) -> Tensor:
    """Loss of each scored token, fp32 [n].

    KL(teacher || model) where the batch holds a teacher's states, else the cross-entropy of its
    labels. Logits are computed again in the backward pass, some tokens at a time.
    """
    with autocast(model.device):
        states, head = scored_states(model, batch), Head.of(model)
        return torch.cat([
            checkpoint(_head_losses, states[part], head, batch, part, teacher,
                       use_reentrant=False, preserve_rng_state=False)
            for part in _parts(batch)])


def _parts(batch: Batch) -> list[slice]:
    """Slices of the scored tokens whose logits may exist at once."""
    return [slice(i, i + _HEAD_ROWS) for i in range(0, len(batch.labels), _HEAD_ROWS)]


def _head_losses(states: Tensor, head: Head, batch: Batch, part: slice, teacher: Head) -> Tensor:
    return _losses(head.logits(states), batch, part, teacher)


def _losses(logits: Tensor, batch: Batch, part: slice, teacher: Head) -> Tensor:
    if batch.states is None:
        return functional.cross_entropy(logits, batch.labels[part], reduction="none")
    wanted = teacher.logits(batch.states[part]).log_softmax(dim=-1)
    return functional.kl_div(logits.log_softmax(dim=-1), wanted, reduction="none",
                             log_target=True).sum(dim=-1)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model makes of the half that nothing is learnt from.

    Attributes:
        kl: nats a token, KL(target under its own RoPE || model) over the target's own answers.
        agreement: share of prompts whose greedy answer is the target's, token for token.
        retrieval_loss: nats a token of the facts hidden in the long rows; None without such rows.
        retrieval: share of long rows whose facts are all recalled.
    """

    kl: float
    agreement: float
    retrieval_loss: float | None
    retrieval: float | None

    def objective(self, keep: float) -> float:
        """keep * kl + (1 - keep) * retrieval_loss, which is what is made small."""
        return keep * self.kl + (1 - keep) * (self.retrieval_loss or 0.0)

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)

    def text(self) -> str:
        parts = [f"kl {self.kl:.4f}", f"agreement {self.agreement:.3f}"]
        if self.retrieval_loss is not None:
            parts += [f"retrieval loss {self.retrieval_loss:.4f}",
                      f"rows recalled {self.retrieval:.3f}"]
        return ", ".join(parts)


@torch.no_grad()
def judge(model: PreTrainedModel, lesson: Lesson) -> Scores:
    """Score a model on the held-out half of a lesson.

    An answer agrees when each of its tokens is the model's first choice given those before it,
    which is when greedy decoding would write it: one forward stands for all of the decoding.
    """
    kl, agreement = _judge(model, lesson.judged_answers, lesson.head)
    loss, right = _judge(model, lesson.judged_long, lesson.head)
    assert kl is not None and agreement is not None  # `build_lesson` sees to it
    return Scores(kl, agreement, loss, right)


def _judge(model: PreTrainedModel, batches: list[Batch],
           teacher: Head) -> tuple[float | None, float | None]:
    """Mean loss over tokens, and share of rows whose labels are all first choices."""
    losses, right = [], []
    for batch in batches:
        wrong = torch.zeros(len(batch.ids), dtype=torch.int64, device=batch.ids.device)
        with autocast(model.device):
            states, head = scored_states(model, batch), Head.of(model)
            for part in _parts(batch):
                logits = head.logits(states[part])
                losses.append(_losses(logits, batch, part, teacher))
                missed = logits.argmax(dim=-1) != batch.labels[part]
                wrong.index_add_(0, batch.rows[part], missed.long())
        right.append(wrong == 0)
    if not losses:
        return None, None
    return torch.cat(losses).double().mean().item(), torch.cat(right).double().mean().item()
