"""Read many short rows after one long one: each sees its keys, none sees another's, none stays.

A KV cache of one row is shared by a batch of rows without a copy for each, and without a change, so
that there is nothing to crop afterwards: a layer with a sliding window has dropped the keys that a
crop would have to bring back. In a layer without a window each new row attends to the shared keys
and to its own in two calls that are joined through their log-sum-exp; in one with a window, whose
shared keys are few, they are put before each row's own.

Shapes: b rows, h query heads, h_kv key heads, s new tokens a row, n shared tokens, d head_dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from extend.errors import CompatibilityError
from extend.evaluate.cache import RoomLayer
from extend.ring.kernels import KERNELS, Kernel, choose_kernel
from extend.ring.lse import merge_partial
from extend.ring.mask import CAUSAL, FULL, Mask

_SHARED: ContextVar["Fork | None"] = ContextVar("shared keys", default=None)
_KNOWN = (DynamicLayer, RoomLayer, DynamicSlidingWindowLayer)


class Fork(Cache):
    """What a model is given in place of the cache of one long row, to read short rows after it.

    Args:
        cache: of one row, at least one token long; it is read and not changed.

    Raises:
        CompatibilityError: a layer that keeps something other than keys and values.
    """

    def __init__(self, cache: DynamicCache):
        strange = [(i, layer) for i, layer in enumerate(cache.layers) if type(layer) not in _KNOWN]
        if strange:
            index, layer = strange[0]
            raise CompatibilityError(
                f"layer {index} keeps {type(layer).__name__} in its cache, and questions can be "
                f"asked on top of keys and values alone ({', '.join(t.__name__ for t in _KNOWN)}); "
                "use a task that reads a row for each question, such as passkey")
        super().__init__(layers=[_ForkedLayer(layer) for layer in cache.layers])
        self._used: list[int] = []

    @contextmanager
    def shared(self) -> Iterator["Fork"]:
        """Inside, `prefill_attention` sees the shared keys before those that it is given.

        Raises:
            CompatibilityError: at the end, when attention of some layer did not ask for them.
        """
        token = _SHARED.set(self)
        try:
            yield self
        finally:
            _SHARED.reset(token)
        if self._used != list(range(len(self.layers))):
            raise CompatibilityError(
                f"of {len(self.layers)} layers of this model, attention of {len(self._used)} took "
                f"keys from the cache in turn (layers {self._used[:8]}...); questions on top of a "
                "cache need each layer to do so once, so use a task that reads a row for each "
                "question, such as passkey")

    def take(self, index: int | None) -> tuple[Tensor, Tensor]:
        """Shared keys and values [1, h_kv, n, d] of a layer, noted as used."""
        self._used.append(-1 if index is None else index)
        return self.layers[self._used[-1]].before


def shared_keys(index: int | None) -> tuple[Tensor, Tensor] | None:
    """Keys and values [1, h_kv, n, d] that new rows see first in a layer; None outside a fork."""
    fork = _SHARED.get()
    return None if fork is None else fork.take(index)


def attend_after(query: Tensor, key: Tensor, value: Tensor, before: tuple[Tensor, Tensor],
                 scale: float) -> Tensor:
    """Causal attention of new rows that all see the keys `before` as well.

    Args:
        query: [b, h, s, d].
        key, value: [b, h_kv, s, d], of the new tokens alone.
        before: keys and values [1, h_kv, n, d] that every query sees.

    Returns:
        out [b, h, s, d].
    """
    kernel = _few_queries(query, key)
    out, lse = kernel.forward(query, key, value, mask=CAUSAL, softmax_scale=scale)
    rows = query.shape[0]
    flat = query.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # [1, h, b * s, d]
    far, far_lse = kernel.forward(flat, *before, mask=FULL, softmax_scale=scale)
    merge_partial(out, lse, far[0].unflatten(1, (rows, -1)).transpose(0, 1),
                  far_lse[0].unflatten(1, (rows, -1)).transpose(0, 1))
    return out


def put_before(before: tuple[Tensor, Tensor], key: Tensor, value: Tensor,
               window: int) -> tuple[Tensor, Tensor]:
    """Keys and values [b, h_kv, m + s, d]: what a window of `window` reaches of `before`, then new.

    The first new token sees the `window - 1` tokens before it, and later ones fewer of them.
    """
    first = max(0, before[0].shape[2] - (window - 1))
    keys, values = (torch.cat([old[:, :, first:].expand(len(new), -1, -1, -1), new], dim=2)
                    for old, new in zip(before, (key, value), strict=True))
    return keys, values


def _few_queries(query: Tensor, key: Tensor) -> Kernel:
    """A kernel for a few queries and a number of keys that differs from call to call.

    cuDNN compiles a graph for every such number, which takes longer than the attention.
    """
    flash = KERNELS["flash"]
    if flash.refuse(query, key) is None:
        return flash
    return choose_kernel("auto", query, key, mask=Mask())


class _ForkedLayer(CacheLayerMixin):
    """Hands new keys back as they come: attention joins them with those `before`."""

    is_croppable = False

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.before = layer.keys, layer.values
        self.is_sliding = layer.is_sliding
        self._length = layer.get_seq_length()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any,
               **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens read so far, those that a window has dropped included: the next position."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return -1
