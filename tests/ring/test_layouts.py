import pytest
import torch

from extend.errors import LayoutError, RecipeError
from extend.ring import LAYOUTS, check_length, length_multiple, shard, unshard

WORLDS = [1, 2, 3, 4, 8]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("multiples", [1, 3])
def test_each_causal_pair_is_computed_exactly_once(layout, world, multiples):
    seq_len = multiples * length_multiple(layout, world)
    count = torch.zeros(seq_len, seq_len, dtype=torch.int64)
    for rank in range(world):
        for step in range(world):
            for query, key in block_pairs(layout, step, rank, world, seq_len):
                count[query, key] += 1
    expected = torch.ones(seq_len, seq_len, dtype=torch.int64).tril()
    torch.testing.assert_close(count, expected, rtol=0, atol=0)


def block_pairs(layout, step, rank, world, seq_len):
    """The (query, key) positions of one block, from the definition of a Block."""
    block = LAYOUTS[layout].block(step, rank, world, seq_len // world)
    if block is None:
        return
    source = (rank - step) % world
    queries = LAYOUTS[layout].positions(seq_len, rank, world)[block.q].tolist()
    keys = LAYOUTS[layout].positions(seq_len, source, world)[block.kv].tolist()
    assert not block.causal or len(queries) == len(keys), "a causal block is square"
    for i, query in enumerate(queries):
        for key in keys[: i + 1] if block.causal else keys:
            yield query, key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
def test_step_0_is_the_whole_local_square(layout, world):
    # The ring loop starts its sums from step 0, so it must cover every local query.
    for rank in range(world):
        block = LAYOUTS[layout].block(0, rank, world, 4)
        assert block.q == slice(None) and block.kv == slice(None) and block.causal


@pytest.mark.parametrize(
    ("layout", "expected"),
    # World 8, local length 6: the first step is a triangle of 21 pairs on every rank; then the
    # slowest rank of each of 7 steps has a full square, half a square, or a triangle.
    [("contiguous", 21 + 7 * 36), ("zigzag", 21 + 7 * 18), ("striped", 21 + 7 * 21)],
)
def test_work_of_the_slowest_rank(layout, expected):
    world, seq_len = 8, 48
    slowest = [
        max(len(list(block_pairs(layout, step, rank, world, seq_len))) for rank in range(world))
        for step in range(world)
    ]
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


def test_zigzag_positions_by_hand():
    held = [LAYOUTS["zigzag"].positions(8, rank, 2).tolist() for rank in range(2)]
    assert held == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_length_that_does_not_divide_is_refused_with_the_nearest_that_do():
    with pytest.raises(LayoutError, match=r"1030 .* 2 x 4 ranks = 8; use 1024 or 1032"):
        check_length(1030, "zigzag", 4)
    with pytest.raises(LayoutError, match=r"'striped': length 3 .* 1 x 4 ranks = 4; use 4$"):
        shard(torch.zeros(1, 3), 1, "striped", 0, 4)
    check_length(1032, "zigzag", 4)


def test_unknown_layout_names_the_known_ones():
    with pytest.raises(RecipeError, match="contiguous, zigzag, striped"):
        check_length(8, "zigzg", 2)
