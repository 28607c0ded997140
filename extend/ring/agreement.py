"""Make sure that all ranks of a ring ask for the same thing before they wait for each other.

A rank that meets a call for the first time compares it with the others', on the host, through the
store in which the processes met; a call met before costs a look into a dictionary. So ranks that
differ find out at once if each of their calls is new. One that repeats an old call while the others
make a new one does not come to the comparison: there the time-out finds it.
"""

import hashlib
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from extend.errors import CompatibilityError
from extend.ring.comm import RingComm
from extend.ring.exchange import exchange, name_ranks

REMEMBERED = 4096  # calls of a group; the oldest goes first, on all ranks alike
SHOWN_CHARACTERS = 200

_seen: "WeakKeyDictionary[Any, dict[int, None]]" = WeakKeyDictionary()  # by a comm's link


def agree(comm: RingComm, what: str, **facts: object) -> None:
    """Return when every rank of `comm` has called this with equal `facts`; the host waits.

    Facts are equal if they print alike.

    Args:
        what: the name of the call, for messages.

    Raises:
        CompatibilityError: they differ, on every rank; it names each difference and who has it.
        RankError: a rank does not come in time.
    """
    if comm.world == 1:
        return
    mine = {name: _print(value) for name, value in facts.items()}
    said = exchange(comm.ranks, mine, what=what, timeout=comm.timeout)
    if any(other != mine for other in said):
        raise CompatibilityError(
            f"{what}: the ranks disagree about {'; '.join(_differences(comm, said))}; "
            "call it with the same shapes and options on every rank of the group"
        )


class Agreement:
    """Agreement on calls of one name, remembered for the group."""

    def __init__(self, comm: RingComm, what: str):
        """Know what the group has agreed on before."""
        self._comm, self._what = comm, what
        self._known = _seen.setdefault(comm.link, {})

    def check(self, signature: tuple[tuple[str, Hashable], ...]) -> None:
        """`agree` on the (name, value) pairs of `signature`; at once if that was done before.

        Raises:
            CompatibilityError, RankError: as `agree`.
        """
        if self._comm.world == 1:
            return
        key = hash((self._what, signature))
        if key in self._known:
            return
        agree(self._comm, self._what, **dict(signature))
        self._known[key] = None
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]


def agree_on_call(comm: RingComm, **facts: Hashable) -> None:
    """Agree on the arguments of a call of ring_attention, once for each set of them.

    Raises:
        CompatibilityError, RankError: as `agree`.
    """
    Agreement(comm, "ring_attention").check(tuple(facts.items()))


def agree_on_kernel(comm: RingComm, **facts: Hashable) -> None:
    """Agree on what the chosen kernel takes, which a trial on each rank's own GPU may have shown.

    Ranks that cut their tiles differently would wait for what nobody sends.

    Raises:
        CompatibilityError, RankError: as `agree`.
    """
    Agreement(comm, "ring_attention's kernel").check(tuple(facts.items()))


def sum_over(comm: RingComm, values: Tensor) -> Tensor:
    """The sum of `values` over the ranks, added in the same order on all, so alike to the last bit.

    On the host, through the store: for a few numbers, once.

    Raises:
        RankError: a rank does not come in time.
    """
    if comm.world == 1:
        return values
    said = exchange(comm.ranks, values.tolist(), what="sum_over", timeout=comm.timeout)
    rows = [torch.tensor(row, dtype=values.dtype) for row in said]
    return torch.stack(rows).sum(0).to(values.device)


def _print(value: object) -> str:
    """A value on one line: a long one in part, with a number that tells it from others."""
    text = repr(value)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters, sha256 {digest})"


def _differences(comm: RingComm, said: list[dict[str, str]]) -> list[str]:
    """For each fact that differs, `name: value (ranks 0, 2), value (rank 1)`."""
    found = []
    for name in dict.fromkeys(name for facts in said for name in facts):
        holders: dict[str, list[int]] = {}
        for rank, facts in zip(comm.ranks, said):
            holders.setdefault(facts.get(name, "not given"), []).append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{value} ({name_ranks(who)})" for value, who in holders.items())
            found.append(f"{name}: {values}")
    return found
