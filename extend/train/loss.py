"""Linear layer and cross-entropy in chunks of tokens: the logits of a row never exist at once.

Shapes: n tokens, d hidden, v vocabulary, c <= chunk tokens. Where processes hold parts of the
vocabulary, v is what this one holds: they exchange three numbers for each token, never logits.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from extend.train.data import IGNORE
from extend.train.vocabulary import VocabularyPart


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients while the logits of a chunk are at hand, and scales them later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor,
                chunk: int, vocabulary: VocabularyPart | None,
                compiled: bool) -> tuple[Tensor, Tensor]:
        # Collectives are left to plain torch.
        reduce = _compile() if compiled and vocabulary is None else _nll_and_gradient
        dtype = _compute_dtype(hidden)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(dtype)
        nll = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = (torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                       if needs_weight else None)
        # Under autocast a matmul would cast its inputs again; they have the right dtype here.
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(labels), chunk):
                part = slice(begin, begin + chunk)
                inputs = hidden[part].to(dtype)
                nll[part], gradient = reduce(inputs @ matrix.t(), labels[part], weights[part],
                                             vocabulary)
                if needs_hidden:
                    grad_hidden[part] = gradient @ matrix
                if needs_weight:
                    grad_weight += gradient.t() @ inputs
        if needs_hidden and vocabulary is not None:
            dist.all_reduce(grad_hidden, group=vocabulary.group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return torch.dot(nll, weights), nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 5


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@cache
def _compile() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_nll_and_gradient)


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


def _targets(labels: Tensor, num_rows: int,
             vocabulary: VocabularyPart | None) -> tuple[Tensor, Tensor]:
    """Columns of the labels among `num_rows` here, int64 [c, 1], and whether they are, bool [c, 1].

    A label that is ignored or elsewhere is given column 0.
    """
    columns = labels.unsqueeze(1) - (0 if vocabulary is None else vocabulary.begin)
    here = (labels.unsqueeze(1) != IGNORE) & (columns >= 0) & (columns < num_rows)
    return columns.masked_fill(~here, 0), here


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, *,
                 chunk: int, vocabulary: VocabularyPart | None = None,
                 compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy of `hidden @ weight.T` against `labels`.

    Matrix products run in the autocast dtype if there is one, everything else in fp32.

    Args:
        hidden: [n, d].
        weight: [v, d], the output head.
        labels: int64 [n]; IGNORE where there is nothing to predict.
        weights: fp32 [n], weight of each token; of no effect where it is ignored.
        chunk: tokens whose logits exist at once.
        vocabulary: which rows of the head `weight` is, all processes of its group having the same
            `hidden`, `labels` and `weights`; None: all rows.
        compiled: what follows the logits runs through torch.compile, where they are whole.

    Returns:
        The loss, fp32 [], and each token's own loss, fp32 [n] (0 where ignored, no gradient).
    """
    return _ChunkedLoss.apply(hidden, weight, labels, weights, chunk, vocabulary, compiled)
