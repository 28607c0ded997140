"""AdamW, and a learning rate that warms up and then follows a cosine in tokens."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
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
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _total_norm(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in map(_local, gradients):
        gradient.mul_(scale)
    return norm


def _total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Of tensors that are sharded over meshes of their own, each part counted once.

    On parts, since torch takes only tensors of one mesh together.
    """
    by_mesh: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = {}
    for gradient in gradients:
        key = None
        if isinstance(gradient, DTensor):
            sharded = [i for i, p in enumerate(gradient.placements) if not p.is_replicate()]
            key = gradient.device_mesh, tuple(sharded)
        by_mesh.setdefault(key, []).append(_local(gradient))
    squares = []
    for key, parts in by_mesh.items():
        square = torch.nn.utils.get_total_norm(parts).double() ** 2
        for dim in key[1] if key is not None else ():
            dist.all_reduce(square, group=key[0].get_group(dim))
        squares.append(square)
    return torch.stack(squares).sum().sqrt().float()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
