import itertools
import time

import numpy as np
import pytest
import torch

from extend.ring.layouts import LAYOUTS, union
from extend.ring.mask import ANTICAUSAL, CAUSAL, FULL, Mask, TileMask
from extend.ring.tiles import (
    Run,
    Tile,
    fit_tiles,
    merge_runs,
    plan_tiles,
    positions_of,
    rows_needed,
)
from tests.ring.pairs import kind_problem, tile_pairs, visible_pairs


def plan(queries, keys, **mask):
    queries, keys = (tuple(Run(*run) for run in runs) for runs in (queries, keys))
    return plan_tiles(queries, keys, Mask(**mask))


def held(layout, seq_len, rank, world):
    return LAYOUTS[layout].runs(seq_len, rank, world)


def others(layout, seq_len, rank, world):
    ranks = tuple(other for other in range(world) if other != rank)
    return union(layout, seq_len, ranks, world).runs


def tile(q, kv, *mask):
    return Tile(slice(*q), slice(*kv), TileMask(*mask))


# Any runs, any masks


def random_runs(rng, stride):
    """Up to four runs of one stride, in any order, that share no position."""
    free = dict.fromkeys(range(stride), 0)
    runs = []
    for _ in range(rng.integers(1, 5)):
        phase = int(rng.integers(stride))
        free[phase] += int(rng.integers(0, 5))
        count = int(rng.integers(1, 9))
        runs.append(Run(phase + stride * free[phase], stride, count))
        free[phase] += count
    return tuple(runs[i] for i in rng.permutation(len(runs)))


def random_mask(rng, end):
    causal = rng.random() < 0.8
    window = int(rng.integers(1, end + 3)) if causal and rng.random() < 0.6 else None
    if rng.random() < 0.5:
        return Mask(causal, window)
    share = rng.choice([0.05, 0.3, 0.8])
    return Mask(causal, window, (0, *(p for p in range(1, end) if rng.random() < share), end))


def row_problem(tiles, q, kv, mask):
    """How often each (query row, key row) is computed, against the definition."""
    count = np.zeros((len(q), len(kv)), dtype=np.int64)
    for tile in tiles:
        seen = tile_pairs(tile)
        assert seen.any(axis=0).all() and seen.any(axis=1).all(), tile
        count[tile.q, tile.kv] += seen
    return np.argwhere(count != visible_pairs(q, kv, mask)).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_any_runs_under_any_mask(seed):
    rng = np.random.default_rng(seed)
    for _ in range(150):
        stride = int(rng.choice([1, 1, 2, 3, 5]))
        queries, keys = random_runs(rng, stride), random_runs(rng, stride)
        if rng.random() < 0.3:
            keys = queries
        q, kv = positions_of(queries).numpy(), positions_of(keys).numpy()
        mask = random_mask(rng, int(max(q.max(), kv.max())) + 1)
        tiles = plan_tiles(queries, keys, mask)
        assert row_problem(tiles, q, kv, mask) == [], (queries, keys, mask)
        for bands, packed in itertools.product((True, False), repeat=2):
            fitted = fit_tiles(tiles, bands=bands, packed=packed)
            what = (queries, keys, mask, bands, packed)
            assert row_problem(fitted, q, kv, mask) == [], what
            assert kind_problem(fitted, bands=bands, packed=packed) is None, what


# What the layouts coalesce to


@pytest.mark.parametrize("rank", range(4))
def test_zigzag_is_one_rectangle_a_source(rank):
    world, seq_len, half = 4, 64, 8
    queries = held("zigzag", seq_len, rank, world)
    for source in range(world):
        tiles = plan_tiles(queries, held("zigzag", seq_len, source, world), Mask())
        if source == rank:
            assert tiles == (tile((0, 16), (0, 16), 0),)
        elif source < rank:  # its head precedes, its tail follows us
            assert tiles == (tile((0, 16), (0, half)),)
        else:  # both lie before our tail only
            assert tiles == (tile((half, 16), (0, 16)),)


@pytest.mark.parametrize("rank", range(4))
def test_zigzag_against_all_other_ranks_is_two_rectangles(rank):
    tiles = plan_tiles(held("zigzag", 64, rank, 4), others("zigzag", 64, rank, 4), Mask())
    before, between = rank * 8, (7 - 2 * rank - 1) * 8
    expected = [
        tile((0, 16), (0, before)),  # before our head
        tile((8, 16), (before, before + between)),  # between head and tail
    ]
    assert list(tiles) == [t for t in expected if t.kv.start < t.kv.stop]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_striped_is_one_causal_square_a_source(world):
    for rank, source in itertools.product(range(world), repeat=2):
        queries, keys = (held("striped", 8 * world, r, world) for r in (rank, source))
        # Query i lies before key i of a later rank: the first query and the last key drop out.
        expected = tile((0, 8), (0, 8), 0) if source <= rank else tile((1, 8), (0, 7), 0)
        assert plan_tiles(queries, keys, Mask()) == (expected,)


def test_contiguous_meets_full_squares():
    queries = held("contiguous", 32, 2, 4)
    plans = [plan_tiles(queries, held("contiguous", 32, r, 4), Mask()) for r in range(4)]
    full = (tile((0, 8), (0, 8)),)
    assert plans == [full, full, (tile((0, 8), (0, 8), 0),), ()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_causality_everything_is_one_full_tile(layout):
    queries, keys = (held(layout, 32, rank, 4) for rank in (1, 2))
    assert plan_tiles(queries, keys, Mask(causal=False)) == (tile((0, 8), (0, 8)),)


def test_contiguous_needs_the_end_of_the_rank_before_for_a_window():
    seq_len, world, local, window = 64, 4, 16, 6
    queries = held("contiguous", seq_len, 2, world)
    plans = [
        plan_tiles(queries, held("contiguous", seq_len, r, world), Mask(window=window))
        for r in range(world)
    ]
    assert plans[0] == plans[3] == ()
    assert plans[1] == (Tile(slice(0, 5), slice(11, 16), ANTICAUSAL),)
    assert rows_needed(plans[1]) == slice(local - (window - 1), local)
    assert plans[2] == (tile((0, 16), (0, 16), 0, 5),)
    assert rows_needed(plans[0]) is None


def test_rows_needed_spans_all_tiles():
    tiles = (tile((0, 4), (5, 7)), tile((0, 4), (2, 9)), tile((0, 4), (3, 4)))
    assert rows_needed(tiles) == rows_needed(tiles[::-1]) == slice(2, 9)
    assert rows_needed(tiles[::2]) == rows_needed(tiles[::-2]) == slice(3, 7)


def test_queries_after_a_gathered_prefix_are_one_band():
    # Queries at 6 ... 9 on keys 0 ... 9: the last row sees the last key.
    assert plan([(6, 1, 4)], [(0, 1, 10)]) == (tile((0, 4), (0, 10), -6),)
    fitted = fit_tiles(plan([(6, 1, 4)], [(0, 1, 10)]), bands=False, packed=False)
    assert fitted == (tile((0, 4), (0, 6)), tile((0, 4), (6, 10), 0))


def test_zigzag_with_a_window_packs_head_and_tail():
    tiles = plan_tiles(held("zigzag", 64, 0, 4), held("zigzag", 64, 0, 4), Mask(window=3))
    assert tiles == (tile((0, 16), (0, 16), 0, 2, (0, 8, 16)),)
    # Between head and tail lie 48 tokens: with 50 the tail's first query sees the head's last key.
    met = plan_tiles(held("zigzag", 64, 0, 4), held("zigzag", 64, 0, 4), Mask(window=50))
    assert met == (tile((0, 16), (0, 16), 0, None, (0, 8, 16)), tile((8, 9), (7, 8)))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_documents_share_one_tile(layout):
    # The documents' edges inside rows 0 ... 15 of the rank, whatever they are outside.
    bounds = (0, 3, 4, 9, 11, 16) if layout == "contiguous" else (0, 3, 4, 58, 61, 64)
    expected = (0, 3, 4, 9, 11, 16) if layout == "contiguous" else (0, 3, 4, 10, 13, 16)
    end = bounds[-1] if layout == "zigzag" else 64
    mask = Mask(cu_seqlens=bounds if end == bounds[-1] else (*bounds, end))
    queries = held(layout, 64, 0, 4)
    tiles = plan_tiles(queries, queries, mask)
    assert tiles == (tile((0, 16), (0, 16), 0, None, expected),)
    windowed = plan_tiles(queries, queries, Mask(window=60, cu_seqlens=mask.cu_seqlens))
    assert windowed == tiles  # no document is longer
    alone = fit_tiles(tiles, bands=False, packed=False)
    assert [t.q for t in alone] == list(itertools.starmap(slice, itertools.pairwise(expected)))
    assert all(t.q == t.kv for t in alone)
    assert [t.mask for t in alone][:2] == [CAUSAL, FULL]  # the second document is one token
    assert fit_tiles(tiles, bands=False, packed=True) == tiles


def test_documents_share_one_tile_without_causality():
    queries = held("zigzag", 64, 0, 4)
    tiles = plan_tiles(queries, queries, Mask(False, None, (0, 3, 58, 61, 64)))
    # The second document holds rows of head and tail: four rectangles, which are one.
    assert tiles == (tile((0, 16), (0, 16), None, None, (0, 3, 10, 13, 16)),)
    alone = fit_tiles(tiles, bands=False, packed=False)
    assert [t.mask for t in alone] == [FULL] * 4


def test_documents_and_a_window_share_one_band():
    tiles = plan([(0, 1, 16)], [(0, 1, 16)], window=3, cu_seqlens=(0, 2, 7, 8, 16))
    assert tiles == (tile((0, 16), (0, 16), 0, 2, (0, 2, 7, 8, 16)),)
    alone = fit_tiles(tiles, bands=True, packed=False)
    assert [t.mask for t in alone] == [CAUSAL, TileMask(0, 2), FULL, TileMask(0, 2)]


def test_other_ranks_see_only_documents_that_cross_over():
    mask = Mask(cu_seqlens=(0, 5, 14, 18, 30, 32))
    queries, keys = held("contiguous", 32, 2, 4), held("contiguous", 32, 1, 4)
    # Document 14 ... 17 holds rows 6 and 7 of rank 1 and rows 0 and 1 of rank 2.
    assert plan_tiles(queries, keys, mask) == (tile((0, 2), (6, 8)),)
    assert rows_needed(plan_tiles(queries, keys, mask)) == slice(6, 8)


def test_runs_in_reach_of_a_window_are_one_square():
    # From 0 to 13: a window of 14 reaches, one of 13 does not.
    runs = [(0, 1, 4), (5, 1, 2), (10, 1, 4)]
    assert plan(runs, runs, window=14) == (tile((0, 10), (0, 10), 0),)
    assert plan(runs, runs, window=13) == (
        tile((0, 10), (0, 10), 0, None, (0, 4, 6, 10)),
        tile((4, 6), (0, 4)),
        tile((6, 10), (0, 4), None, 2),
        tile((6, 10), (4, 6)),
    )
    runs = [(0, 5, 2), (6, 5, 2)]  # steps of 5, 1 and 5
    assert plan(runs, runs, window=16) == (tile((0, 4), (0, 4), 0),)
    # Positions 0, 1, 2 all see one another backwards; a window of 6 is one step of 5.
    runs, bounds = [(0, 5, 1), (1, 5, 1), (2, 5, 1), (20, 5, 2)], (0, 10, 30)
    tiles, positions = plan(runs, runs, window=6, cu_seqlens=bounds), np.array([0, 1, 2, 20, 25])
    assert row_problem(tiles, positions, positions, Mask(True, 6, bounds)) == []


# Cutting for kernels without bands


@pytest.mark.parametrize(("rows", "window"), [(24, 6), (25, 6), (29, 6), (7, 6), (12, 1), (12, 2)])
def test_a_window_is_cut_into_squares_without_waste(rows, window):
    tiles = plan([(0, 1, rows)], [(0, 1, rows)], window=window)
    assert len(tiles) == 1
    cut = fit_tiles(tiles, bands=False, packed=False)
    computed = sum(int(tile_pairs(t).sum()) for t in cut)
    assert computed == sum(min(i + 1, window) for i in range(rows))
    # A kernel that skips nothing inside a square on the diagonal does less than half of it in vain.
    area = sum((t.q.stop - t.q.start) * (t.kv.stop - t.kv.start) for t in cut)
    sides = [t.q.stop - t.q.start for t in cut if t.mask in (CAUSAL, ANTICAUSAL)]
    assert area - computed == sum(side * (side - 1) // 2 for side in sides)
    if rows % window == 0 and window > 2:
        causal = [Tile(slice(c, c + window), slice(c, c + window), CAUSAL)
                  for c in range(0, rows, window)]  # fmt: skip
        back = window - 1
        behind = [Tile(slice(c, c + back), slice(c - back, c), ANTICAUSAL)
                  for c in range(window, rows, window)]  # fmt: skip
        assert sorted(cut, key=str) == sorted(causal + behind, key=str)


def test_a_kernel_for_documents_gets_the_squares_of_a_window_in_one_call():
    tiles = fit_tiles(plan([(0, 1, 12)], [(0, 1, 12)], window=4), bands=False, packed=True)
    assert tiles == (
        tile((0, 12), (0, 12), 0, None, (0, 4, 8, 12)),
        Tile(slice(4, 7), slice(1, 4), ANTICAUSAL),
        Tile(slice(8, 11), slice(5, 8), ANTICAUSAL),
    )


def test_a_kernel_that_takes_everything_gets_the_plan():
    tiles = plan([(0, 1, 16)], [(0, 1, 16)], window=3, cu_seqlens=(0, 2, 7, 8, 16))
    assert fit_tiles(tiles, bands=True, packed=True) is tiles


# Runs


def test_positions_of_runs():
    held = positions_of((Run(4, 3, 2), Run(0, 1, 1), Run(20, 1, 0)))
    torch.testing.assert_close(held, torch.tensor([4, 7, 0]), rtol=0, atol=0)
    assert positions_of(()).tolist() == [] and positions_of(()).dtype == torch.int64


def test_runs_merge_where_positions_continue():
    runs = (Run(0, 1, 2), Run(2, 1, 3), Run(9, 1, 1), Run(10, 7, 1), Run(3, 1, 0), Run(12, 1, 1))
    assert merge_runs(runs) == (Run(0, 1, 5), Run(9, 1, 2), Run(12, 1, 1))
    assert merge_runs((Run(1, 4, 2), Run(9, 4, 3))) == (Run(1, 4, 5),)
    assert merge_runs((Run(0, 8, 1), Run(1, 8, 1))) == (Run(0, 1, 2),)


def test_runs_of_one_row_take_the_stride_of_the_others():
    # Positions 0 and 1 do not continue one another in steps of 4.
    tiles = plan([(0, 4, 3)], [(0, 8, 1), (1, 8, 1)])
    q, kv = np.array([0, 4, 8]), np.array([0, 1])
    assert row_problem(tiles, q, kv, Mask()) == []


def test_runs_of_different_strides_are_refused():
    with pytest.raises(ValueError, match=r"strides 1 and 4 .* one layout"):
        plan([(0, 4, 3)], [(0, 1, 3)])


def test_positions_behind_the_last_document_are_refused():
    with pytest.raises(ValueError, match=r"position 9, behind .* ends at 9; cu_seqlens"):
        plan([(0, 1, 10)], [(0, 1, 9)], cu_seqlens=(0, 4, 9))


def test_tiles_can_be_cached():
    # slice has no hash before Python 3.12, a Tile has.
    one, same, other = tile((0, 4), (0, 4), 0), tile((0, 4), (0, 4), 0), tile((0, 4), (0, 5), 0)
    assert {one: "found"}.get(same) == "found" and {one: "found"}.get(other) is None


# Speed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_million_tokens_are_planned_in_milliseconds(layout):
    # 50 ms a pair is the limit; a plan that looked at positions would take seconds. Documents of
    # very different lengths, some longer than the window and some than a piece.
    seq_len, world = 1 << 20, 8
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice(np.arange(1, seq_len), 499, replace=False)).tolist()
    mask = Mask(window=4096, cu_seqlens=(0, *ends, seq_len))
    parts = [held(layout, seq_len, rank, world) for rank in range(world)]
    seconds = []
    for queries, keys in itertools.product(parts, parts):
        began = time.process_time()
        tiles = plan_tiles.__wrapped__(queries, keys, mask)  # past the cache
        fit_tiles.__wrapped__(tiles, bands=False, packed=False)
        seconds.append(time.process_time() - began)
    assert np.mean(seconds) < 0.05
