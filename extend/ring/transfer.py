"""The vocabulary of fetching: what is asked for, and what is under way."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Select = Callable[[Tensor, int], Tensor | None]  # (published buffer, receiver) -> a view of it


class Request(NamedTuple):
    """Fetch from the rank `step` places back."""

    step: int
    into: Tensor | None  # any strides; None where nothing comes
    select: Select


class Arrival(NamedTuple):
    """A request that brings something: `source` is the view of the owner's buffer that it names."""

    owner: int
    into: Tensor
    source: Tensor


class Transfer:
    """Fetches under way. Wait for each, also where nothing comes: something may be leaving."""

    def __init__(self, wait: Callable[[], None] | None = None, held: object = None):
        """`wait` ends it; `held` is kept alive until then."""
        self._wait, self._held = wait, held

    def wait(self) -> None:
        """Return when what was asked for may be read and what was published may be overwritten.

        With CUDA it is the current stream that waits, not the host.

        Raises:
            RankError: a rank does not answer in time, or is gone (on the CPU; see `RingComm`).
        """
        if self._wait is not None:
            self._wait()
        self._wait = self._held = None
