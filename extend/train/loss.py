"""Linear layer and loss in chunks of tokens: the logits of a row never exist at once.

The loss is cross-entropy, or the divergence from what another model, the teacher, predicts.

Shapes: n tokens, d hidden, v vocabulary, c <= chunk tokens. Where processes hold parts of the
vocabulary, v is what this one holds: they exchange three numbers for each token, never logits.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from extend.train.data import IGNORE
from extend.train.vocabulary import VocabularyPart

TEACHER_PARTS = 4
"""A chunk that has two models' logits, and more of them in fp32, is so many times shorter."""


class Teacher(NamedTuple):
    """What another model of the same vocabulary makes of the same tokens: hidden states [n, d'],
    and the rows of its output head that stand for those of the head beside it, [v, d'].
    """

    hidden: Tensor
    weight: Tensor


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients while the logits of a chunk are at hand, and scales them later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor,
                chunk: int, vocabulary: VocabularyPart | None, compiled: bool,
                teacher: Teacher | None) -> tuple[Tensor, Tensor]:
        reduce = _nll_and_gradient if teacher is None else _divergence_and_gradient
        if compiled and vocabulary is None:  # collectives are left to plain torch
            reduce = _compile(reduce)
        dtype = _compute_dtype(hidden)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(dtype)
        nll = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        loss = nll if teacher is None else torch.empty_like(nll)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = (torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                       if needs_weight else None)
        # Under autocast a matmul would cast its inputs again; they have the right dtype here.
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(labels), chunk):
                part = slice(begin, begin + chunk)
                inputs = hidden[part].to(dtype)
                known = (labels[part], weights[part], vocabulary)
                if teacher is None:
                    nll[part], gradient = reduce(inputs @ matrix.t(), *known)
                else:
                    taught = teacher.hidden[part] @ teacher.weight.to(teacher.hidden.dtype).t()
                    loss[part], nll[part], gradient = reduce(inputs @ matrix.t(), taught, *known)
                    del taught
                if needs_hidden:
                    grad_hidden[part] = gradient @ matrix
                if needs_weight:
                    grad_weight += gradient.t() @ inputs
                del gradient  # before the next chunk's logits are made
        if needs_hidden and vocabulary is not None:
            dist.all_reduce(grad_hidden, group=vocabulary.group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return torch.dot(loss, weights), nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 6


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@cache
def _compile(reduce: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(reduce)


def _nll_and_gradient(logits: Tensor, labels: Tensor, weights: Tensor,
                      vocabulary: VocabularyPart | None) -> tuple[Tensor, Tensor]:
    """Losses fp32 [c] (0 where ignored), and the gradient of `logits` [c, v] in their dtype.

    Logits in fp32 are overwritten: a chunk of them is the largest tensor of a step.
    """
    dtype, logits = logits.dtype, logits.float()
    ignored = labels == IGNORE
    targets, here = _targets(labels, logits.shape[1], vocabulary)
    top = logits.amax(dim=1, keepdim=True)
    if vocabulary is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=vocabulary.group)
    logits -= top
    target_logits = logits.gather(1, targets).masked_fill(~here, 0.0)
    sums = logits.exp_().sum(dim=1, keepdim=True)
    if vocabulary is not None:
        both = torch.stack((sums, target_logits))
        dist.all_reduce(both, group=vocabulary.group)
        sums, target_logits = both
    nll = sums.log() - target_logits
    scale = weights.masked_fill(ignored, 0.0).unsqueeze(1)
    logits *= scale / sums
    at_targets = logits.gather(1, targets) - scale.masked_fill(~here, 0.0)
    gradient = logits.to(dtype).scatter_(1, targets, at_targets.to(dtype))
    return nll.squeeze(1).masked_fill(ignored, 0.0), gradient


def _divergence_and_gradient(
    logits: Tensor, taught: Tensor, labels: Tensor, weights: Tensor,
    vocabulary: VocabularyPart | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The KL divergence of the predictions from those taught, fp32 [c] (0 where ignored).

    Also the losses fp32 [c], and the gradient of the weighted divergence, [c, v] as `logits`.
    """
    ignored = labels == IGNORE
    own, theirs = _log_softmax(logits, vocabulary), _log_softmax(taught, vocabulary)
    shares = theirs.exp()
    divergence = (shares * (theirs - own)).sum(dim=1, keepdim=True)
    targets, here = _targets(labels, logits.shape[1], vocabulary)
    nll = -own.gather(1, targets).masked_fill(~here, 0.0)
    if vocabulary is not None:
        both = torch.stack((divergence, nll))
        dist.all_reduce(both, group=vocabulary.group)
        divergence, nll = both
    scale = weights.masked_fill(ignored, 0.0).unsqueeze(1)
    gradient = ((own.exp() - shares) * scale).to(logits.dtype)
    kept = [value.squeeze(1).masked_fill(ignored, 0.0) for value in (divergence, nll)]
    return *kept, gradient


def _log_softmax(logits: Tensor, vocabulary: VocabularyPart | None) -> Tensor:
    """fp32 [c, v], over the whole vocabulary."""
    logits = logits.float()
    top = logits.amax(dim=1, keepdim=True)
    if vocabulary is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=vocabulary.group)
    logits = logits - top
    sums = logits.exp().sum(dim=1, keepdim=True)
    if vocabulary is not None:
        dist.all_reduce(sums, group=vocabulary.group)
    return logits - sums.log()


def _targets(labels: Tensor, num_rows: int,
             vocabulary: VocabularyPart | None) -> tuple[Tensor, Tensor]:
    """Columns of the labels among `num_rows` here, int64 [c, 1], and whether they are, bool [c, 1].

    A label that is ignored or elsewhere is given column 0.
    """
    columns = labels.unsqueeze(1) - (0 if vocabulary is None else vocabulary.begin)
    here = (labels.unsqueeze(1) != IGNORE) & (columns >= 0) & (columns < num_rows)
    return columns.masked_fill(~here, 0), here


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, *,
                 chunk: int, vocabulary: VocabularyPart | None = None, compiled: bool = False,
                 teacher: Teacher | None = None) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy of `hidden @ weight.T` against `labels`.

    With a teacher it is the weighted sum of the KL divergence of the predictions from its own.

    Matrix products run in the autocast dtype if there is one, everything else in fp32.

    Args:
        hidden: [n, d].
        weight: [v, d], the output head.
        labels: int64 [n]; IGNORE where there is nothing to predict.
        weights: fp32 [n], weight of each token; of no effect where it is ignored.
        chunk: tokens whose logits exist at once; with a teacher a quarter of that.
        vocabulary: which rows of the head `weight` is, all processes of its group having the same
            `hidden`, `labels` and `weights`; None: all rows.
        compiled: what follows the logits runs through torch.compile, where they are whole.

    Returns:
        The loss, fp32 [], and each token's own cross-entropy, fp32 [n] (0 where ignored, no
        gradient).
    """
    if teacher is not None:
        chunk = max(1, chunk // TEACHER_PARTS)
    return _ChunkedLoss.apply(hidden, weight, labels, weights, chunk, vocabulary, compiled, teacher)
