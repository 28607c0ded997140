"""Small facts between ranks, through the store in which the processes first met.

Nothing of it touches a GPU or a communicator, so it works before these are known to work, and can
name a rank that does not answer.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

from extend.errors import CompatibilityError, RankError

_numbers: dict[tuple[int, ...], int] = {}  # how many exchanges these ranks have had


def exchange(ranks: tuple[int, ...], fact: Any, *, what: str, timeout: timedelta) -> list[Any]:
    """Return what every one of the (global) `ranks` passed as `fact`, in their order.

    All of them must call it, and equally often. The host waits. Each rank leaves one entry in the
    store.

    Args:
        ranks: ranks of the default group, this one among them.
        fact: anything that JSON holds.
        what: the name of what they all do, for messages.
        timeout: how long to wait for the others.

    Raises:
        CompatibilityError: ranks differ in `what`.
        RankError: a rank does not come within `timeout`, or the store is gone.
    """
    if len(ranks) == 1:
        return [fact]
    number = _numbers[ranks] = _numbers.get(ranks, 0) + 1
    store, me = _get_default_store(), dist.get_rank()
    keys = [_key(ranks, number, rank) for rank in ranks]
    try:
        store.set(_key(ranks, number, me), json.dumps([what, fact]))
        store.wait(keys, timeout)
        said = [json.loads(text) for text in _read(store, keys)]
        # Who is here has read everything of the last exchange.
        store.delete_key(_key(ranks, number - 1, me))
    except RuntimeError as error:
        raise _explain(error, store, dict(zip(ranks, keys)), what, timeout) from error
    _check_calls(ranks, [call for call, _ in said])
    return [fact for _, fact in said]


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 1, 3`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _key(ranks: tuple[int, ...], number: int, rank: int) -> str:
    members = hashlib.sha1(repr(ranks).encode()).hexdigest()[:16]
    return f"extend/{members}/{number}/{rank}"


def _check_calls(ranks: tuple[int, ...], calls: list[str]) -> None:
    if len(set(calls)) > 1:
        each = "; ".join(f"{call} ({name_ranks([rank])})" for rank, call in zip(ranks, calls))
        raise CompatibilityError(
            f"the ranks call different things: {each}; every rank of a group must make the same "
            "calls in the same order"
        )


def _read(store: Store, keys: list[str]) -> list[bytes]:
    if store.has_extended_api():
        return store.multi_get(keys)
    return [store.get(key) for key in keys]


def _explain(
    error: RuntimeError, store: Store, keys: dict[int, str], what: str, timeout: timedelta
) -> RankError:
    me, first_line = dist.get_rank(), str(error).splitlines()[0]
    try:
        absent = [rank for rank, key in keys.items() if not store.check([key])]
    except RuntimeError:
        absent = []
    if not absent:
        return RankError(
            f"{what}: rank {me} cannot reach the store that the processes share ({first_line}); "
            "the process that holds it, usually rank 0 or the launcher, has ended: see its log"
        )
    return RankError(
        f"rank {me}: {name_ranks(absent)} of {name_ranks(list(keys))} did not call {what} within "
        f"{timeout.total_seconds():g} s; it died, hangs, is slower than the time-out, or does "
        "something else: look for the first error in its log, or raise the time-out "
        "(timeout= of init_process_group)"
    )
