"""Layers that keep little and compute the rest again, each with its own choice of what it keeps."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from extend.errors import CompatibilityError
from extend.ring.keep import Kept
from extend.train.memory.store import Store
from extend.train.memory.tiles import is_tokenwise, tile_module
from extend.train_options import TrainOptions

_AUTO_TILE, _AUTO_FROM = 16384, 65536  # tokens


class LayerMemory:
    """What the layers of a model keep from their forward to their backward: a Keeper of the ring.

    Every layer that is computed again keeps its input, in `inputs`; the first `kept_attention`
    layers also what their attention gave, in `attention`, so that it is not computed again. The
    layers after the first `recomputed` keep all that autograd saves: they are needed first, and
    have given their memory back when the others compute again.
    """

    def __init__(self, inputs: Store, attention: Store, recomputed: int, kept_attention: int):
        self.inputs, self.recomputed = inputs, recomputed
        self._rooms = [Kept(attention.put, attention.take)
                       for _ in range(min(recomputed, kept_attention))]

    def of(self, layer: int | None) -> Kept | None:
        return None if layer is None or layer >= len(self._rooms) else self._rooms[layer]

    def run(self, layer: nn.Module, function: Callable[..., Any], *args: Any,
            **kwargs: Any) -> Any:
        """Call `function` of a layer so that it keeps its tensors in `inputs` and runs again when
        it is due.
        """
        if not _has_gradient(layer, (*args, *getattr(function, "keywords", kwargs).values())):
            # It would never run again, and what it put would be taken for the next row's.
            with torch.no_grad():
                return function(*args, **kwargs)
        # Only what the checkpoint itself saves, its inputs, is seen by hooks from outside.
        with saved_tensors_hooks(self.inputs.put, self.inputs.take):
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False,
                              **kwargs)


def _has_gradient(layer: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether a gradient is due in the layer; below the first trained parameter there is none."""
    tensors = (t for t in inputs if isinstance(t, torch.Tensor))
    return any(t.requires_grad for t in (*tensors, *layer.parameters()))


def checkpoint_layers(model: PreTrainedModel, memory: LayerMemory) -> None:
    """Let the decoder layers that are computed again run through `memory`.

    Raises:
        CompatibilityError: layers that transformers cannot checkpoint.
    """
    layers = [layer for layer in model.get_decoder().layers
              if hasattr(layer, "gradient_checkpointing")]
    if len(layers) != len(model.get_decoder().layers):
        raise CompatibilityError(f"{type(model).__name__}: its layers cannot be checkpointed; "
                                 "train with recomputed_layers 0")
    for layer in layers[:memory.recomputed]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(memory.run, layer)


def make_memory(options: TrainOptions, num_layers: int, device: torch.device,
                world: int) -> LayerMemory:
    """What the options ask for; the host's memory is shared evenly by its processes."""
    share = options.host_memory // int(os.environ.get("LOCAL_WORLD_SIZE", world))
    kept = num_layers if options.kept_attention == "all" else options.kept_attention
    recomputed = (num_layers if options.recomputed_layers in ("auto", "all")
                  else min(options.recomputed_layers, num_layers))
    # One budget: inputs, which all layers keep, and attention outputs take turns in it.
    store = Store(device, share, options.kept_form)
    attention = Store(device) if options.kept_form == "fp8" else store
    return LayerMemory(store, attention, recomputed, kept)


def tile_layers(model: PreTrainedModel, options: TrainOptions, local_len: int) -> None:
    """Let MLPs and norms work on few tokens at a time, if the options or the rows ask for it.

    Args:
        local_len: most tokens of a row that a process holds.
    """
    tile = options.tile_tokens
    if tile == "auto":
        tile = _AUTO_TILE if local_len > _AUTO_FROM else None
    if tile is None:
        return
    for module in model.get_decoder().modules():
        if is_tokenwise(module):
            tile_module(module, tile)
