"""In which dtype weights are kept, gathered and multiplied.

The optimizer updates weights in `weight_dtype`; layers compute in `compute_dtype`. Where the two
differ, FSDP2 keeps the trained weights in fp32, gathers them in bf16, and sums their gradients in
fp32; that is also done in a run of one process, with a group of its own. Activations between layers
are then bf16 as in a model that was loaded in bf16: norms and angles compute in fp32 inside, the
loss sums in fp32, and frequencies, positions and the weights of tokens keep their dtypes.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from extend.train_options import TrainOptions


def compute_dtype(options: TrainOptions) -> torch.dtype:
    """The dtype of activations and of gathered weights."""
    if options.compute_dtype != "auto":
        return getattr(torch, options.compute_dtype)
    low = options.weight_dtype == "bfloat16" or torch.cuda.is_available()
    return torch.bfloat16 if low else torch.float32


def set_dtypes(model: nn.Module, options: TrainOptions) -> None:
    """Give what is trained the dtype of its updates, and what is not the dtype of its use."""
    trained, frozen = getattr(torch, options.weight_dtype), compute_dtype(options)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)


def needs_sharding(options: TrainOptions) -> bool:
    """Whether one process alone needs what FSDP2 does besides sharding."""
    return (options.optimizer == "adamw-offload"
            or getattr(torch, options.weight_dtype) != compute_dtype(options))


def sharding_policies(options: TrainOptions, device: torch.device) -> dict[str, Any]:
    """Arguments of `fully_shard` for these options."""
    # Inputs are not cast: layers pass on what they computed, and weights of tokens stay fp32.
    policies = {"mp_policy": MixedPrecisionPolicy(
        param_dtype=compute_dtype(options), reduce_dtype=torch.float32, cast_forward_inputs=False)}
    if options.optimizer == "adamw-offload":
        policies["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    return policies
