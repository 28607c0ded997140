import pytest

from extend.ring.layouts import LAYOUTS, Block
from extend.ring.schedule import Schedule


def make_schedule(layout, causal=True, rank=0):
    return Schedule(LAYOUTS[layout], rank=rank, world=4, local_len=8, causal=causal)


@pytest.mark.parametrize(
    ("layout", "causal", "expected"),
    [
        ("contiguous", True, [3, 2, 1, 0]),  # only later ranks have a use for these keys
        ("contiguous", False, [3, 3, 3, 3]),
        ("zigzag", True, [3, 3, 3, 3]),
        ("striped", True, [3, 3, 3, 3]),
    ],
)
def test_last_step_with_a_use(layout, causal, expected):
    schedule = make_schedule(layout, causal)
    assert [schedule.last_step(source) for source in range(4)] == expected


def test_without_a_mask_every_block_is_whole():
    schedule = make_schedule("zigzag", causal=False, rank=1)
    assert [schedule.block(step) for step in range(4)] == 4 * [
        Block(slice(None), slice(None), causal=False)
    ]


def test_keys_come_from_the_ranks_behind_in_turn():
    schedule = make_schedule("zigzag", rank=1)
    assert [schedule.source(step) for step in range(4)] == [1, 0, 3, 2]
    assert [schedule.source(step, 0) for step in range(4)] == [0, 3, 2, 1]
