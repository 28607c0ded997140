"""AdamW in the form that the options ask for, and a learning rate that warms up and then follows
a cosine in tokens."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from extend.train.low_bits import require_torchao
from extend.train_options import Phase, TrainOptions

logger = logging.getLogger(__name__)


def build_optimizer(parameters: Iterable[nn.Parameter],
                    options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW over the parameters that train; vectors (norms, biases) do not decay.

    Raises:
        CompatibilityError: torchao is needed and not installed.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    lr, betas = options.schedule[0].lr, options.betas
    if options.optimizer == "adamw-8bit":
        return _eight_bit_adamw()(groups, lr=lr, betas=betas,
                                  bf16_stochastic_round=options.stochastic_rounding)
    fused = options.optimizer == "adamw-offload" or any(p.device.type == "cuda" for p in trained)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def _eight_bit_adamw() -> type[torch.optim.Optimizer]:
    """torchao's AdamW with moments in 8 bits, whose moments say that they are read as fp32.

    Made as weights' dtype, as torchao makes them, those of sharded bf16 weights are refused by
    DTensor: torchao forgets the dtype where it wraps them, and the two then disagree.
    """
    require_torchao("optimizer adamw-8bit")
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    class EightBitAdamW(AdamW8bit):
        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            return OptimState8bit.zeros(p.shape, signed, block_size, p.device,
                                        dtype=torch.float32)

    return EightBitAdamW


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer create what it creates at its first step, without a change of weights.

    So that there is a place to load a checkpoint into. Only the states' steps are not what they
    were; a state that exists is left alone.
    """
    lacking = [p for group in optimizer.param_groups for p in group["params"]
               if not optimizer.state[p]]
    if not lacking:
        return
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.0)
    for p in lacking:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        _set_rate(group, lr)


def tell_lost_updates(options: TrainOptions) -> None:
    """Say so when weights cannot take in the updates that they are given.

    bf16 keeps 8 bits of a number: between 2^e and 2^(e+1) it has steps of 2^(e-7), and what is
    less than half a step is rounded away. AdamW's update is about the learning rate.
    """
    if options.weight_dtype != "bfloat16" or options.stochastic_rounding or options.mode != "full":
        return
    lr = max(phase.lr for phase in options.schedule)
    logger.warning("weight_dtype bfloat16: with lr %g, weights above %.2g stay what they are: "
                   "updates below half a step of bfloat16 are rounded away. weight_dtype float32 "
                   "keeps them, or stochastic_rounding with optimizer adamw-8bit", lr, lr * 2**9)


def seed_rounding(seed: int, phase: int, step: int) -> None:
    """Let the chances of a step follow from the run's seed, so that a resumed run has the same.

    They are the same in all processes, so replicas stay equal.
    """
    torch.manual_seed((seed << 40) ^ (phase << 32) ^ step)


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
        _set_rate(group, lr)


def _set_rate(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao's; the compiled update must see the same tensor
        group["lr"].fill_(lr)
    else:
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
