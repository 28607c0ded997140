"""Norms, MLPs and the projections of attention as torch.compile makes them.

What lies between matrix products (norms, rotation, gating) moves memory and computes little;
compiled, each such stretch is read and written once. Modules are compiled one by one and not whole
layers: those of one kind share one compilation, and sharding, checkpoints and tiles stay what they
are around them. Attention itself is left to the ring: `extend.ring.hf_attention` is not traced.
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from extend.errors import CompatibilityError
from extend.train.memory.tiles import is_tokenwise
from extend.train_options import TrainOptions


def compile_layers(model: PreTrainedModel, options: TrainOptions, device: torch.device) -> None:
    """Compile what the decoder's layers are made of, if the options and the device ask for it.

    Call it after `tile_layers`. Results differ from plain ones by rounding only.

    Raises:
        CompatibilityError: it was asked for, but there is no Triton.
    """
    has_triton = find_spec("triton") is not None
    if options.compile is True and device.type == "cuda" and not has_triton:
        raise CompatibilityError("compile is true, but the package triton is not installed; "
                                 "install it, or write compile: false")
    if not (options.compile is True or (device.type == "cuda" and has_triton
                                        and options.compile == "auto")):
        return
    decoder = model.get_decoder()
    parts = [child for layer in decoder.layers for child in layer.children()]
    for module in [*parts, *decoder.children()]:
        if is_tokenwise(module) or type(module).__name__.endswith("Attention"):
            _compile(module)


def _compile(module: nn.Module) -> None:
    """A tiled module is compiled for one tile: what calls it tile by tile is plain Python."""
    name = "plain_forward" if hasattr(module, "plain_forward") else "forward"
    setattr(module, name, torch.compile(getattr(module, name)))
