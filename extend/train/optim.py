"""AdamW, and a learning rate that warms up and then follows a cosine in tokens."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from extend.train_options import Phase, TrainOptions


def build_optimizer(parameters: Iterable[nn.Parameter], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over the parameters that train; vectors (norms, biases) do not decay."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    on_cuda = any(p.device.type == "cuda" for p in trained)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.schedule[0].lr,
                             betas=options.betas, fused=on_cuda)


def learning_rate(phase: Phase, step: int) -> float:
    """Learning rate of a step (from 0) of a phase.

    Linear from 0 to `lr` over the first `warmup_frac` of the phase's tokens, then a cosine that
    ends at `lr * min_lr_frac`. A step counts with the tokens seen at its end.
    """
    tokens_per_step = phase.length * phase.batch_rows
    total = phase.num_steps * tokens_per_step
    seen, warmup = (step + 1) * tokens_per_step, phase.warmup_frac * total
    if seen <= warmup:
        return phase.lr * seen / warmup
    progress = (seen - warmup) / (total - warmup)
    floor = phase.lr * phase.min_lr_frac
    return floor + (phase.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`.

    Returns:
        The norm before, fp32 [], over the whole model however it is sharded.
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}  # torch takes those of one at a time
    for p in parameters:
        if p.grad is not None:
            by_mesh.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    norms = [_norm(p.grad for p in group) for group in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
