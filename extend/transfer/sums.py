"""A model whose weights are a sum while it is used: W + factor * delta, with a gradient.

The sum is made where a weight is read, in fp32, and rounded once to the weight's dtype, as a merge
would write it. With activation checkpointing only one layer's sums exist at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from extend.errors import CompatibilityError

_MAX_PROBLEMS = 8  # of one message


class LowRank(NamedTuple):
    """A delta scaling * lora_B @ lora_A: [out, r] @ [r, in]."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.lora_B.shape[0], self.lora_A.shape[1]))


Delta = Tensor | LowRank


def whole(delta: Delta) -> Tensor:
    """The delta as one fp32 tensor."""
    if isinstance(delta, LowRank):
        return delta.scaling * (delta.lora_B.float() @ delta.lora_A.float())
    return delta.float()


class _Sum(nn.Module):
    """The parametrization W -> W + factor * delta."""

    def __init__(self, delta: Delta, factor: Tensor | float):
        super().__init__()
        self.delta, self.factor = delta, factor

    def forward(self, weight: Tensor) -> Tensor:
        # Autocast would compute the product of the factors in bfloat16.
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.float() + self.factor * whole(self.delta)).to(weight.dtype)


@contextmanager
def added(model: nn.Module, deltas: Mapping[str, Delta],
          factors: Mapping[str, Tensor | float]) -> Iterator[None]:
    """Add factor * delta to every parameter named, wherever it is shared, until the block ends.

    The parameters themselves are not changed. Gradients flow to the factors, to the deltas and to
    the parameters, as far as these ask for them.

    Args:
        deltas: name of a parameter -> its delta, on the model's device.
        factors: the same names -> scalar.

    Raises:
        CompatibilityError: a delta without its parameter, or of another shape.
    """
    places = _places(model, deltas)
    registered: list[tuple[nn.Module, str]] = []
    try:
        for name, found in places.items():
            for module, leaf in found:
                parametrize.register_parametrization(
                    module, leaf, _Sum(deltas[name], factors[name]), unsafe=True)
                registered.append((module, leaf))
        yield
    finally:
        for module, leaf in registered:
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


def check_fit(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CompatibilityError, with all that is wrong, unless the model has these parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    problems = [f"{name} {list(shape)} but the model has "
                f"{list(parameters[name].shape) if name in parameters else 'no such parameter'}"
                for name, shape in shapes.items()
                if name not in parameters or list(parameters[name].shape) != list(shape)]
    more = len(problems) - _MAX_PROBLEMS
    problems[_MAX_PROBLEMS:] = [f"and {more} more"] if more > 0 else []
    if problems:
        raise CompatibilityError(f"the delta does not fit the target: {'; '.join(problems)}; give "
                                 "a fine-tune of the delta's own base (checkpoints that "
                                 "transformers converts while loading are not supported yet)")


def _places(model: nn.Module, deltas: Mapping[str, Delta]) -> dict[str, list[tuple]]:
    """Where each delta goes: a tied head has the embedding's parameter under a second name."""
    check_fit(model, {name: delta.shape for name, delta in deltas.items()})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    return {name: [_split(model, alias) for alias in names_of[id(parameters[name])]]
            for name in deltas}


def _split(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf
