"""Modules of which each process of a tensor-parallel group holds a part.

Their parameters are DTensors. While such a module runs, the parts take their place as plain
tensors, so that what it computes (attention, tiles, adapters, compiled code) is what it always
computes, on fewer heads or channels; only its input and its output know of the other processes.

Source: Megatron-LM, arXiv:1909.08053, section 3: the conjugate functions f and g.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Shard

from extend.errors import CompatibilityError

_INPUT = "hidden_states"


class _SumGradients(torch.autograd.Function):
    """The tensor itself; its gradient is the sum over the group, each process having a share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)  # others may read it too
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumShares(torch.autograd.Function):
    """The sum over the group, in place; the gradient of the sum is that of every share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(share)
        dist.all_reduce(share, group=group)
        return share

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def sum_gradients(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x`, for use by all processes of the group, whose gradients are then summed."""
    return _SumGradients.apply(x, group)


def sum_shares(share: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the group, in the memory of `share`; what follows is the same in all processes."""
    return _SumShares.apply(share.contiguous(), group)


@contextmanager
def local_parameters(module: nn.Module) -> Iterator[None]:
    """Put this process's parts in the place of all parameters that are DTensors, for a while.

    Gradients go through to the DTensors. That of a parameter which every process holds whole is a
    share: each sees its own heads or channels only. A bias that is added to shares of a sum is
    divided by their number.
    """
    held = []
    try:
        for owner in module.modules():
            in_shares = _gives_shares(owner)
            for name, parameter in owner.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    held.append((owner, name, parameter))
                    part = _part(parameter)
                    divided = in_shares and name == "bias"
                    owner._parameters[name] = (part / parameter.device_mesh.size() if divided
                                               else part)
        yield
    finally:
        for owner, name, parameter in held:
            owner._parameters[name] = parameter


def _part(parameter: DTensor) -> Tensor:
    [placement] = parameter.placements
    return parameter.to_local(grad_placements=[Partial() if placement.is_replicate()
                                               else placement])


def _gives_shares(owner: nn.Module) -> bool:
    """Whether it is a linear layer that is split along its input."""
    weight = owner._parameters.get("weight")
    return isinstance(weight, DTensor) and weight.placements == (Shard(1),)


class _Split:
    """The hooks of a module that maps hidden states to hidden states and is split inside."""

    def __init__(self, group: ProcessGroup):
        self.group, self._swapped = group, ExitStack()

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not args and _INPUT not in kwargs:
            raise CompatibilityError(f"{type(module).__name__} takes no {_INPUT}, so it cannot be "
                                     "split; set tensor_parallel to 1")
        self._swapped.enter_context(local_parameters(module))
        if args:
            return (sum_gradients(args[0], self.group), *args[1:]), kwargs
        return args, kwargs | {_INPUT: sum_gradients(kwargs[_INPUT], self.group)}

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Called in any case: with None when the module raised, as recompute does on purpose."""
        self._swapped.close()
        if isinstance(output, Tensor):
            return sum_shares(output, self.group)
        if output is None:
            return None
        return (sum_shares(output[0], self.group), *output[1:])


def split_module(module: nn.Module, group: ProcessGroup) -> None:
    """Let a module with parameters split over `group` compute with its parts.

    Its input, the same in all processes, is its first argument or `hidden_states`. What it returns,
    or the first part of that, is summed over the group.
    """
    hooks = _Split(group)
    module.register_forward_pre_hook(hooks.before, with_kwargs=True)
    module.register_forward_hook(hooks.after, always_call=True)
