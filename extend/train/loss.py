"""Linear layer and cross-entropy in chunks of tokens: the logits of a row never exist at once.

Shapes: n tokens, d hidden, v vocabulary, c <= chunk tokens.
"""

from typing import Any

import torch
from torch import Tensor

from extend.train.data import IGNORE


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients while the logits of a chunk are at hand, and scales them later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor,
                chunk: int) -> tuple[Tensor, Tensor]:
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
                logits = (inputs @ matrix.t()).float()
                nll[part] = _nll_and_gradient(logits, labels[part], weights[part])
                gradient = logits.to(dtype)
                if needs_hidden:
                    grad_hidden[part] = gradient @ matrix
                if needs_weight:
                    grad_weight += gradient.t() @ inputs
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
        return grad_hidden, grad_weight, None, None, None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _nll_and_gradient(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Losses fp32 [c] (0 where ignored); `logits` fp32 [c, v] turns into their gradient in place.

    In place because a chunk of logits is the largest tensor of a step.
    """
    ignored = labels == IGNORE
    targets = labels.masked_fill(ignored, 0).unsqueeze(1)
    logits -= logits.amax(dim=1, keepdim=True)
    target_logits = logits.gather(1, targets)
    sums = logits.exp_().sum(dim=1, keepdim=True)
    nll = sums.log() - target_logits
    scale = weights.masked_fill(ignored, 0.0).unsqueeze(1)
    logits *= scale / sums
    logits.scatter_add_(1, targets, -scale)
    return nll.squeeze(1).masked_fill(ignored, 0.0)


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, *,
                 chunk: int) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy of `hidden @ weight.T` against `labels`.

    Matrix products run in the autocast dtype if there is one, everything else in fp32.

    Args:
        hidden: [n, d].
        weight: [v, d], the output head.
        labels: int64 [n]; IGNORE where there is nothing to predict.
        weights: fp32 [n], weight of each token; of no effect where it is ignored.
        chunk: tokens whose logits exist at once.

    Returns:
        The loss, fp32 [], and each token's own loss, fp32 [n] (0 where ignored, no gradient).
    """
    return _ChunkedLoss.apply(hidden, weight, labels, weights, chunk)
