"""A KV cache with room for a known number of tokens: it is filled in place and never moved.

transformers' own grows by concatenation, which copies everything read so far with every part and
leaves blocks of memory that fit nothing larger.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class RoomLayer(DynamicLayer):
    """Keys and values of a layer without a window, in tensors of a fixed size.

    Args:
        room: tokens that it can hold.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any,
               **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [b, h_kv, s, d] behind those that are there; return all.

        Raises:
            ValueError: there is no room for them.
        """
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if end > self.room:
            raise ValueError(f"a cache with room for {self.room} tokens gets token {end}")
        if self._buffers is None:
            self._buffers = tuple(new.new_empty(*new.shape[:2], self.room, new.shape[3])
                                  for new in (key_states, value_states))
            self.device, self.is_initialized = key_states.device, True
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def make_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """An empty cache for rows of at most `room` tokens.

    Layers of other kinds (windows, states) are transformers' own.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomLayer(room) if type(layer) is DynamicLayer else layer
                    for layer in cache.layers]
    return cache
