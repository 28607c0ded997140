"""Norms, MLPs and the projections of attention as torch.compile makes them.

What lies between matrix products (norms, rotation, gating) moves memory and computes little;
compiled, each such stretch is read and written once. Modules are compiled one by one and not whole
layers: those of one kind share one compilation, and sharding, checkpoints and tiles stay what they
are around them. Attention itself is left to the ring: `extend.ring.hf_attention` is not traced.

In layers that are not computed again, what element-wise work makes of values that are saved anyway
is not saved beside them but made again in backward: of a gated MLP the product of gate and up.
There it is in memory together with the gradients (two inner values more), but of one layer only.
Tiles save nothing, so they are compiled as ever.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from extend.errors import CompatibilityError
from extend.train.memory.tiles import is_tokenwise
from extend.train_options import TrainOptions


def compiles(options: TrainOptions, device: torch.device) -> bool:
    """Whether the options and the device ask for compiled code.

    Raises:
        CompatibilityError: the options do, but there is no Triton.
    """
    lacks_triton = device.type == "cuda" and find_spec("triton") is None
    if options.compile is True and lacks_triton:
        raise CompatibilityError("compile is true, but the package triton is not installed; "
                                 "install it, or write compile: false")
    return options.compile is True or (
        options.compile == "auto" and device.type == "cuda" and not lacks_triton)


def compile_layers(model: PreTrainedModel, recomputed: int) -> None:
    """Compile what the decoder's layers are made of; the first `recomputed` are computed again.

    Call it after `tile_layers`. Results differ from plain ones by rounding only.
    """
    decoder = model.get_decoder()
    parts = [child for layer in decoder.layers for child in layer.children()]
    saving = {child for layer in decoder.layers[recomputed:] for child in layer.children()
              if type(child).__name__.endswith("MLP") and not hasattr(child, "plain_forward")}
    for module in [*parts, *decoder.children()]:
        if is_tokenwise(module) or type(module).__name__.endswith("Attention"):
            _compile(module, saving_backend if module in saving else "inductor")


def _compile(module: nn.Module, backend: str | Callable[..., Any]) -> None:
    """A tiled module is compiled for one tile: what calls it tile by tile is plain Python."""
    name = "plain_forward" if hasattr(module, "plain_forward") else "forward"
    setattr(module, name, torch.compile(getattr(module, name), backend=backend))


def saving_backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor, which by itself also saves what it could make again, where a product reads it."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(aggressive_recomputation=True):
        return compile_fx(graph, inputs)
