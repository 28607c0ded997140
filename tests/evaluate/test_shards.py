"""Where keys lie, against sets of positions written down one by one."""

import random

import pytest
import torch

from extend.errors import CompatibilityError
from extend.evaluate.shards import Part, Shards, clip
from extend.ring.tiles import Run, positions_of


class Model:
    """Three ranks' shards of a row whose keys are their own positions; -1 is padding's."""

    windows = (None, 1, 2, 5, 64)

    def __init__(self, world):
        self.world = world
        self.shards = [Shards(rank, world) for rank in range(world)]
        self.length = self.reach = 0

    def read(self, count, owner=None):
        """The keys that every rank then has, by rank and window, of a forward of `count` more."""
        part = Part(self.length, count, owner)
        found = {}
        for rank, shards in enumerate(self.shards):
            shards.begin(part)
            positions = positions_of(part.runs(rank, self.world)) if owner is None else \
                torch.arange(part.begin, part.end)
            positions[positions >= part.end] = -1
            k = positions.float()[None, None, :, None].expand(1, 2, -1, 3).contiguous()
            for index, window in enumerate(self.windows):
                keys, values = shards.put(part, index, k, 2 * k, window=window, keep=True)
                torch.testing.assert_close(values, 2 * keys)
                named = positions_of(shards.held(rank, window) + part.runs(rank, self.world))
                found[rank, window] = keys[0, 1, :, 2].long(), named
            shards.end(part)
        if owner is None:
            self.reach = max(self.reach, self.length)
        self.length += count
        return found

    def truncate(self, length):
        for shards in self.shards:
            shards.truncate(length)
        self.length = length

    def expected(self, window):
        """Positions that a query of the last part may still see, or a later one."""
        first = 0 if window is None else max(0, self.reach - (window - 1))
        return list(range(first, self.length))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_position_is_held_once_and_where_it_is_said_to_be(world, seed):
    draw, model = random.Random(seed), Model(world)
    for _ in range(12):
        owner = draw.choice([None, world - 1])
        if model.length > model.reach and draw.random() < 0.4:
            model.truncate(draw.randint(max(model.reach, 1), model.length))
        found = model.read(draw.randint(1, 30), owner)
        for window in model.windows:
            held = []
            for rank in range(world):
                keys, named = found[rank, window]
                real = keys >= 0
                torch.testing.assert_close(keys[real], named[real])
                assert bool((named[~real] >= model.length).all())  # what is not real comes after
                held += keys[real].tolist()
            assert sorted(held) == model.expected(window)


def test_a_row_does_not_go_back_to_where_windows_have_dropped_keys():
    model = Model(2)
    model.read(20)
    model.read(20)
    model.truncate(25)
    model.truncate(20)  # where the last part began
    with pytest.raises(CompatibilityError, match="a row of 20 tokens cannot go back to 19"):
        model.truncate(19)


def test_memory_is_taken_once_for_what_is_expected():
    shards, k = Shards(0, 1), torch.zeros(1, 1, 10, 4)
    shards.expect(30)
    places = set()
    for begin in (0, 10, 20):
        part = Part(begin, 10)
        shards.begin(part)
        keys, _ = shards.put(part, 0, k + begin, k, window=None, keep=True)
        shards.end(part)
        places.add(keys.data_ptr())
    assert len(places) == 1
    torch.testing.assert_close(keys[0, 0, :, 0], torch.arange(3.0).repeat_interleave(10) * 10)
    part = Part(30, 1, owner=0)
    shards.begin(part)
    keys, _ = shards.put(part, 0, k[:, :, :1] + 30, k[:, :, :1], window=None, keep=True)
    torch.testing.assert_close(keys[0, 0, 9:, 0], torch.tensor([0.0] + [10.0] * 10 + [20.0] * 10
                                                               + [30.0]))


def test_a_row_in_one_part_is_not_kept():
    shards, k = Shards(0, 1), torch.zeros(1, 1, 10, 4)
    part = Part(0, 10)
    shards.begin(part)
    assert shards.put(part, 0, k, k, window=None, keep=False)[0] is k
    assert not shards._full and not shards._recent


def test_clip():
    assert clip(Run(5, 1, 10), 7, 12) == Run(7, 1, 5)
    assert clip(Run(5, 1, 10), 0, 5).count == clip(Run(5, 1, 10), 15, 20).count == 0
