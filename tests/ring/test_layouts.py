import itertools

import pytest
import torch

from extend.errors import LayoutError, RecipeError
from extend.ring.layouts import (
    LAYOUTS,
    Layout,
    check_length,
    length_multiple,
    shard,
    ulysses_ranks,
    union,
    unshard,
)
from extend.ring.mask import CAUSAL, FULL, Mask, TileMask
from extend.ring.tiles import Run, fit_tiles, plan_tiles, positions_of
from tests.ring.pairs import (
    coverage_problem,
    kind_problem,
    lengths,
    masks_for,
    sharings,
    tile_pairs,
)

WORLDS = [1, 2, 3, 4, 8]
KERNELS = [{"bands": b, "packed": p} for b, p in itertools.product((True, False), repeat=2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
def test_each_visible_pair_is_computed_exactly_once(layout, world):
    for seq_len in lengths(layout, world):
        for name, meetings in sharings(layout, seq_len, world).items():
            for mask in masks_for(seq_len, seq_len // world // LAYOUTS[layout].divisor):
                plans = [(q, kv, plan_tiles(q, kv, mask)) for q, kv in meetings]
                what = (name, seq_len, mask)
                assert coverage_problem(plans, seq_len, mask) is None, what
                for kernel in KERNELS:
                    fitted = [(q, kv, fit_tiles(tiles, **kernel)) for q, kv, tiles in plans]
                    assert coverage_problem(fitted, seq_len, mask) is None, (*what, kernel)
                    tiles = tuple(itertools.chain.from_iterable(t for _, _, t in fitted))
                    assert kind_problem(tiles, **kernel) is None, (*what, kernel)


class Broken(Layout):
    """Zigzag with its runs moved: (start, count) of head and tail of one rank."""

    divisor = 2

    def __init__(self, head: tuple[int, int], tail: tuple[int, int]):
        self.changes = head, tail

    def runs(self, seq_len, rank, world):
        runs = LAYOUTS["zigzag"].runs(seq_len, rank, world)
        if rank != 1:
            return runs
        changes = zip(runs, self.changes, strict=True)
        return tuple(Run(r.start + start, 1, r.count + count) for r, (start, count) in changes)


@pytest.mark.parametrize(
    "broken",
    [
        Broken((1, 0), (0, 0)),
        Broken((0, 0), (-1, 0)),
        Broken((0, 1), (0, -1)),
        Broken((0, 0), (0, 1)),
        Broken((0, -1), (0, 0)),
    ],
    ids=["head late", "tail early", "cut late", "too long", "too short"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_coverage_finds_a_layout_that_is_off_by_one(monkeypatch, broken, causal):
    name = f"zigzag changed by {broken.changes}"  # unions are cached by this name
    monkeypatch.setitem(LAYOUTS, name, broken)
    for way, meetings in sharings(name, 24, 4).items():
        plans = [(q, kv, plan_tiles(q, kv, Mask(causal))) for q, kv in meetings]
        assert coverage_problem(plans, 24, Mask(causal)) is not None, way


BREAKAGES = {
    "causal missing": lambda tile: [tile._replace(mask=FULL)] if tile.mask == CAUSAL else [tile],
    "causal too much": lambda tile: [tile._replace(mask=CAUSAL)] if tile.mask == FULL else [tile],
    "diagonal up": lambda tile: [tile._replace(mask=TileMask(-1))] if tile.mask.lo == 0 else [tile],
    "diagonal down": lambda tile: (
        [tile._replace(mask=TileMask(1))] if tile.mask.lo == 0 else [tile]
    ),
    "tile missing": lambda tile: [] if tile.mask == FULL else [tile],
    "tile twice": lambda tile: [tile, tile],
    "a key missing": lambda tile: [tile._replace(kv=slice(tile.kv.start, tile.kv.stop - 1))],
}


@pytest.mark.parametrize("broken", BREAKAGES)
def test_coverage_finds_broken_tiles(broken):
    plans = [(q, kv, plan_tiles(q, kv, Mask())) for q, kv in sharings("zigzag", 24, 4)["ring"]]
    assert coverage_problem(plans, 24, Mask()) is None
    hits = 0
    for index, (q, kv, tiles) in enumerate(plans):  # one source on one rank at a time
        changed = tuple(new for tile in tiles for new in BREAKAGES[broken](tile))
        if changed != tiles:
            others = plans[:index] + plans[index + 1 :]
            assert coverage_problem([*others, (q, kv, changed)], 24, Mask()) is not None
            hits += 1
    assert hits >= 4


@pytest.mark.parametrize(
    ("layout", "expected"),
    # World 8, local length 6: the own keys are a triangle of 21 pairs on every rank; then the
    # slowest rank of each of 7 steps has a full square, half a square, or a triangle.
    [("contiguous", 21 + 7 * 36), ("zigzag", 21 + 7 * 18), ("striped", 21 + 7 * 21)],
)
def test_work_of_the_slowest_rank(layout, expected):
    world, seq_len = 8, 48
    held = [LAYOUTS[layout].runs(seq_len, rank, world) for rank in range(world)]

    def work(rank: int, step: int) -> int:
        tiles = plan_tiles(held[rank], held[(rank - step) % world], Mask())
        return sum(tile_pairs(tile).sum() for tile in tiles)

    slowest = [max(work(rank, step) for rank in range(world)) for step in range(world)]
    assert sum(slowest) == expected
    # Zigzag is perfectly balanced: that is all pairs, divided by the ranks.
    assert sum(slowest) >= seq_len * (seq_len + 1) / 2 / world == 21 + 7 * 18


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
def test_local_positions_increase(layout, world):
    # hf_attention tells packed documents from a layout by this.
    seq_len = 4 * length_multiple(layout, world)
    for rank in range(world):
        assert (LAYOUTS[layout].positions(seq_len, rank, world).diff() > 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
def test_unshard_undoes_shard(layout, world):
    seq_len = 2 * length_multiple(layout, world)
    whole = torch.arange(3 * seq_len * 2).reshape(3, seq_len, 2)
    parts = [shard(whole, 1, layout, rank, world) for rank in range(world)]
    assert all(part.shape == (3, seq_len // world, 2) for part in parts)
    torch.testing.assert_close(unshard(parts, 1, layout), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("striped", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_positions_by_hand(layout, expected):
    held = [LAYOUTS[layout].positions(8, rank, 2) for rank in range(2)]
    assert [positions.tolist() for positions in held] == expected
    assert held[0].dtype == torch.int64


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ranks", "world"), [
    ((0,), 1), ((1,), 3), ((0, 1, 2), 3), ((1, 0), 2), ((0, 2), 3), ((4, 5, 6, 7), 8),
    ((0, 1, 2, 4, 5, 6, 7), 8), ((1, 3, 5, 7), 8), ((7, 3), 8), ((0, 4, 1), 8),
    (tuple(range(8)), 8),
])  # fmt: skip
@pytest.mark.parametrize("multiples", [1, 3])
def test_union_puts_every_row_in_its_place(layout, ranks, world, multiples):
    seq_len = multiples * length_multiple(layout, world)
    joined = union(layout, seq_len, ranks, world)
    rows = torch.full((len(ranks) * seq_len // world,), -1)
    taken = torch.zeros_like(rows)
    assert len(joined.places) == len(ranks)
    for rank, places in zip(ranks, joined.places, strict=True):
        own = LAYOUTS[layout].positions(seq_len, rank, world)
        assert sum(len(own[part]) for part, _ in places) == len(own)
        for part, place in places:
            rows[place] = own[part]
            taken[place] += 1
    torch.testing.assert_close(taken, torch.ones_like(taken), rtol=0, atol=0)
    torch.testing.assert_close(positions_of(joined.runs), rows, rtol=0, atol=0)
    if layout != "striped" or ranks in {(1, 3, 5, 7), (7, 3)} or len(ranks) == world:
        assert (rows.diff() > 0).all()


def test_unions_are_few_runs():
    everyone = tuple(range(8))
    for layout in LAYOUTS:
        assert union(layout, 48, everyone, 8).runs == (Run(0, 1, 48),)
    assert union("zigzag", 48, (0, 1, 3, 4, 5, 6, 7), 8).runs == (
        Run(0, 1, 6), Run(9, 1, 30), Run(42, 1, 6),
    )  # fmt: skip
    assert union("zigzag", 16, (3, 1), 4).places == (
        ((slice(0, 4), slice(2, 6)),),
        ((slice(0, 2), slice(0, 2)), (slice(2, 4), slice(6, 8))),
    )
    assert union("striped", 48, (1, 5), 8).runs == (Run(1, 4, 12),)
    assert union("striped", 48, (1, 5), 8).places == (
        ((slice(0, 6), slice(0, 11, 2)),), ((slice(0, 6), slice(1, 12, 2)),),
    )  # fmt: skip
    # No even stride describes these two: one after the other.
    assert union("striped", 48, (1, 2), 8).runs == (Run(1, 8, 6), Run(2, 8, 6))
    assert union("zigzag", 48, (), 8) == ((), ())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("world", "degree"), [(4, 2), (8, 2), (8, 4), (6, 3), (3, 3), (4, 1)])
def test_ulysses_groups_are_the_same_layout_over_fewer_ranks(layout, world, degree):
    seq_len, groups = 12 * world, world // degree
    found = {ulysses_ranks(layout, rank, world, degree) for rank in range(world)}
    assert len(found) == groups and all(len(group) == degree for group in found)
    assert all(rank in ulysses_ranks(layout, rank, world, degree) for rank in range(world))
    held = [positions_of(union(layout, seq_len, group, world).runs) for group in found]
    fewer = [LAYOUTS[layout].positions(seq_len, group, groups) for group in range(groups)]
    assert sorted(t.tolist() for t in held) == sorted(t.tolist() for t in fewer)


def test_ulysses_groups_by_hand():
    assert ulysses_ranks("contiguous", 5, 8, 4) == (4, 5, 6, 7)
    assert ulysses_ranks("zigzag", 2, 8, 2) == (2, 3)
    assert ulysses_ranks("striped", 5, 8, 4) == (1, 3, 5, 7)


@pytest.mark.parametrize("degree", [0, 3, 16])
def test_a_degree_that_does_not_divide_the_world_is_refused(degree):
    with pytest.raises(LayoutError, match=rf"8 ranks .* groups of {degree} .* divides 8"):
        ulysses_ranks("zigzag", 0, 8, degree)


def test_length_that_does_not_divide_is_refused_with_the_nearest_that_do():
    with pytest.raises(LayoutError, match=r"1030 .* 2 x 4 ranks = 8; use 1024 or 1032"):
        check_length(1030, "zigzag", 4)
    with pytest.raises(LayoutError, match=r"'striped': length 3 .* 1 x 4 ranks = 4; use 4$"):
        shard(torch.zeros(1, 3), 1, "striped", 0, 4)
    with pytest.raises(LayoutError, match="1030"):
        union("zigzag", 1030, (0, 1), 4)
    with pytest.raises(LayoutError, match=r"length 0 .* use 8$"):
        check_length(0, "zigzag", 4)
    check_length(1032, "zigzag", 4)


def test_unknown_layout_names_the_known_ones():
    for call in (
        lambda: check_length(8, "zigzg", 2),
        lambda: ulysses_ranks("zigzg", 0, 4, 2),
        lambda: union("zigzg", 8, (0,), 2),
    ):
        with pytest.raises(RecipeError, match="contiguous, zigzag, striped"):
            call()
