"""Layers that keep little and compute the rest again, each with its own choice of what it keeps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        self._attention, self._kept = attention, kept_attention
        self._rooms: dict[int, Kept] | None = None  # of the layer that runs
        self._again = False

    def of(self, layer: int | None) -> Kept | None:
        if self._rooms is None or layer is None or layer >= self._kept:
            return None
        room = self._rooms.setdefault(layer, Kept(self._attention.put, self._attention.take))
        room.again = self._again
        return room

    def run(self, layer: nn.Module, function: Callable[..., Any], *args: Any,
            **kwargs: Any) -> Any:
        """Call `function` of a layer so that it keeps its tensors in `inputs` and runs again when
        it is due.
        """
        if not _has_gradient(layer, (*args, *getattr(function, "keywords", kwargs).values())):
            with torch.no_grad():  # it would never run again, and what it put would stay for ever
                return function(*args, **kwargs)
        rooms: dict[int, Kept] = {}  # of this run alone: what it puts, only its second run takes
        self.inputs.begin_layer()
        # Only what the checkpoint itself saves, its inputs, is seen by hooks from outside.
        with saved_tensors_hooks(self.inputs.put, self.inputs.take):
            return checkpoint(
                function, *args, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (self._use(rooms), self._use(rooms, again=True)), **kwargs)

    @contextmanager
    def _use(self, rooms: dict[int, Kept], *, again: bool = False) -> Iterator[None]:
        """Within, attention puts what it gives into `rooms`, or takes it out again."""
        before = self._rooms, self._again
        self._rooms, self._again = rooms, again
        try:
            yield
        finally:
            self._rooms, self._again = before


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


def make_memory(options: TrainOptions, recomputed: int, device: torch.device,
                local_world: int) -> LayerMemory:
    """What the options ask for, of `recomputed` layers; a host's memory is shared evenly by its
    `local_world` processes.
    """
    share = options.host_memory // local_world
    kept = recomputed if options.kept_attention == "all" else options.kept_attention
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
