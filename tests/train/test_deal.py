"""Rows dealt to groups by the cost of their attention: as good as any other way, and the same."""

import itertools
import random

import pytest

from extend.train.deal import deal, imbalance, join_turns


def waits(turns: list[tuple[int, ...]], costs: list[int]) -> int:
    return sum(max(costs[row] for row in turn) for turn in turns)


def splits(rows: tuple[int, ...], size: int):
    """Every way to split rows into turns of `size`."""
    if not rows:
        yield []
        return
    for rest in itertools.combinations(rows[1:], size - 1):
        turn = (rows[0], *rest)
        for others in splits(tuple(row for row in rows if row not in turn), size):
            yield [turn, *others]


@pytest.mark.parametrize(("groups", "turns"), [(2, 4), (4, 2), (3, 3)])
def test_no_other_split_waits_less(groups: int, turns: int):
    rng = random.Random(0)
    for _ in range(4):
        costs = [rng.choice([1, 5, 30, rng.randrange(1, 1000)]) for _ in range(groups * turns)]
        best = min(waits(split, costs) for split in splits(tuple(range(len(costs))), groups))
        assert waits(deal(costs, [False] * len(costs), groups), costs) == best


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_every_row_is_dealt_once_and_each_group_gets_as_many(groups: int):
    rng = random.Random(groups)
    costs = [rng.randrange(100) for _ in range(12)]
    turns = deal(costs, [row % 3 == 0 for row in range(12)], groups)
    assert sorted(row for turn in turns for row in turn) == list(range(12))
    assert all(len(turn) == groups for turn in turns) and len(turns) == 12 // groups


def test_rows_of_one_cost_are_dealt_in_turn():
    assert deal([7] * 6, [False] * 6, 3) == [(0, 1, 2), (3, 4, 5)]


def test_who_had_least_gets_the_dearest():
    assert deal([9, 8, 5, 1], [False] * 4, 2) == [(0, 1), (3, 2)]
    assert imbalance([[turn] for turn in deal([9, 8, 5, 1], [False] * 4, 2)],
                     [9, 8, 5, 1]) == (9 + 5) / ((17 + 6) / 2)


def test_batches_hold_one_kind_and_are_as_many_for_all_groups():
    kinds = [True, False, True, False, False, True, False, False]
    turns = deal([1] * 8, kinds, 2)
    assert turns == [(1, 3), (4, 6), (0, 7), (2, 5)]
    # The third turn has a row of each kind, so nothing joins it.
    assert join_turns(turns, kinds, 8) == [[(1, 3), (4, 6)], [(0, 7)], [(2, 5)]]
    assert join_turns(turns, kinds, 1) == [[turn] for turn in turns]
    assert join_turns(deal([1] * 8, [False] * 8, 2), [False] * 8, 3) == [
        [(0, 1), (2, 3), (4, 5)], [(6, 7)]]


def test_rows_without_cost_are_even():
    assert imbalance([[(0, 1)]], [0, 0]) == 1.0
