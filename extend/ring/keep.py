"""Attention that is computed once, though the layer around it is computed again for its backward.

A layer that is checkpointed runs twice: in the forward pass, and again when its gradient is due.
Between the two its attention's out and lse are kept, so that the second run needs no attention and
no keys of other ranks.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Kept:
    """Room for what the attention of one layer gave, from its first run to its second.

    A layer may attend more than once; what it put first is taken first.

    Args:
        pack: turns a tensor into what is held, such as a place in another memory.
        unpack: gives the tensor back.

    Attributes:
        again: whether the layer runs for the second time.
    """

    def __init__(self, pack: Callable[[Tensor], Any] = lambda t: t,
                 unpack: Callable[[Any], Tensor] = lambda t: t):
        self._pack, self._unpack = pack, unpack
        self._held: deque[tuple[Any, ...]] = deque()
        self.again = False

    def put(self, tensors: tuple[Tensor, ...]) -> None:
        # Without their history: what is returned from two runs must not be one tensor.
        self._held.append(tuple(self._pack(t.detach()) for t in tensors))

    def take(self) -> tuple[Tensor, ...]:
        """What was put, once."""
        return tuple(self._unpack(t) for t in self._held.popleft())


class Keeper(Protocol):
    """Says which layers' attention is kept."""

    def of(self, layer: int | None) -> Kept | None:
        """The room of a layer, or None where attention is computed again."""
        ...
