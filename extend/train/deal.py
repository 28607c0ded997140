"""Which rows of a step each data-parallel group computes, and which of them at once.

Rows of one length differ in the cost of their attention: it grows with the square of each document.
Groups gather the weights together, layer by layer, so they meet in every batch, and each waits for
the one with the dearest. Rows are therefore dealt in the order of their cost, one to each group in
turn: then the sum of what the dearest rows of all turns cost is as small as it can be, since any
other split into turns pairs a dear row with a cheap one. Whoever has had least so far gets the
dearest row of a turn, which evens out the totals too.

All ranks reckon this alike, from integers and without a message. Nor does the loss depend on it:
each token's weight counts it in the whole step, whoever computes it.
"""

from collections.abc import Sequence
from typing import Any

Turn = tuple[int, ...]
"""One row for each group, in the order of the groups."""


def deal(costs: Sequence[int], kinds: Sequence[Any], groups: int) -> list[Turn]:
    """Deal the rows of a step, as many to each group.

    Args:
        costs: of every row.
        kinds: rows of different kinds are not computed at once, so like comes with like. They have
            an order and a hash.
        groups: a divisor of the number of rows.

    Returns:
        the turns, in the order in which they are computed.
    """
    order = sorted(range(len(costs)), key=lambda row: (kinds[row], -costs[row], row))
    loads = [0] * groups
    turns = []
    for begin in range(0, len(order), groups):
        ranked = sorted(order[begin:begin + groups], key=lambda row: (-costs[row], row))
        least_first = sorted(range(groups), key=lambda group: (loads[group], group))
        rows = dict(zip(least_first, ranked, strict=True))
        for group, row in rows.items():
            loads[group] += costs[row]
        turns.append(tuple(rows[group] for group in range(groups)))
    return turns


def join_turns(turns: Sequence[Turn], kinds: Sequence[Any], at_once: int) -> list[list[Turn]]:
    """Turns that are computed at once: at most so many, and of one kind for all groups.

    Every group gets as many batches: they gather the weights together in each.
    """
    batches: list[list[Turn]] = []
    before: set[Any] = set()
    for turn in turns:
        now = {kinds[row] for row in turn}
        if batches and len(batches[-1]) < at_once and len(now) == 1 and now == before:
            batches[-1].append(turn)
        else:
            batches.append([turn])
        before = now
    return batches


def imbalance(batches: Sequence[Sequence[Turn]], costs: Sequence[int]) -> float:
    """How much longer the groups' attention takes than if all cost the same: 1.0 is perfect.

    In every batch the dearest group counts, over the mean of all groups.
    """
    waited = total = 0
    for turns in batches:
        loads = [sum(costs[row] for row in rows) for rows in zip(*turns, strict=True)]
        waited, total = waited + max(loads) * len(loads), total + sum(loads)
    return waited / total if total else 1.0
