import random
from itertools import pairwise
from unittest import mock

import pytest
import torch

from extend.ring import groups
from extend.ring.blocks import KeySum, split_heads
from extend.ring.call import Call
from extend.ring.comm import RingComm
from extend.ring.kernels import KERNELS
from extend.ring.mask import CAUSAL, FULL, Mask
from extend.ring.partial import AttentionSum, GradientSum, assemble, sums_keys
from extend.ring.tiles import Tile
from tests.ring.attention_oracle import SCALE, attention, make_tensors

ROWS = 12
BF16 = torch.bfloat16


def make_call(kernel=KERNELS["reference"]):
    return Call(RingComm.alone(), "contiguous", Mask(causal=False), kernel, SCALE, ROWS)


def cut(size, num_parts, rng):
    """0 to `size` in `num_parts` slices."""
    bounds = [0, *sorted(rng.sample(range(1, size), num_parts - 1)), size]
    return [slice(a, b) for a, b in pairwise(bounds)]


def random_portions(rng, num_portions, most_tiles):
    """Keys in portions, and for each its tiles, which let all queries see all its keys."""
    portions = []
    for keys in cut(ROWS, num_portions, rng):
        num_keys = keys.stop - keys.start
        tiles = [
            Tile(q, kv, FULL)
            for kv in cut(num_keys, min(num_keys, rng.randint(1, 2)), rng)
            for q in cut(ROWS, rng.randint(1, most_tiles), rng)
        ]
        rng.shuffle(tiles)
        portions.append((keys, tuple(tiles)))
    return portions


ALL = [(None, slice(0, 2))]  # (query heads, key heads)
HALVES = [(slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads", [[ALL], [HALVES], [ALL, HALVES]], ids=["all", "halves", "both"])
@pytest.mark.parametrize(
    ("num_portions", "most_tiles"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 1), (4, 3), (ROWS, 2)]
)
def test_attention_and_gradients_from_portions(num_portions, most_tiles, heads, seed):
    rng = random.Random(seed)
    q, k, v, dout = make_tensors(ROWS, ROWS, torch.float64, (4, 2))
    expected = attention(q, k, v, dout, torch.ones(ROWS, ROWS, dtype=torch.bool))
    portions = random_portions(rng, num_portions, most_tiles)
    plan = [tiles for _, tiles in portions]
    total = AttentionSum(q, make_call(), plan)
    gradient = GradientSum(dout, q, *expected[:2], make_call(), plan)
    dk, dv = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    work = [(*portion, *part) for portion in portions for part in rng.choice(heads)]
    rng.shuffle(work)
    for keys, tiles, q_heads, kv_heads in work:
        part = k[:, kv_heads, keys], v[:, kv_heads, keys]
        total.add(tiles, *part, q_heads)
        dk[:, kv_heads, keys], dv[:, kv_heads, keys] = gradient.add(tiles, *part, q_heads)
    # fp64 in, so fp64 all the way: some tens of roundings of numbers up to 10.
    got = (*total.result(), gradient.dq(), dk, dv)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("most", "calls"), [(2**31, 1), (3072, 2), (1, 4)])
def test_heads_in_groups(most, calls, monkeypatch):
    """However many heads a kernel gets at once, the same bits come out."""
    monkeypatch.setattr(groups, "MOST_SUM_BYTES", most)
    q, k, v, dout = make_tensors(ROWS, ROWS, torch.float64, (8, 4))
    out, lse, *expected = attention(q, k, v, dout, torch.ones(ROWS, ROWS).tril().bool())
    kernel = mock.Mock(wraps=KERNELS["reference"])
    tiles = (Tile(slice(0, ROWS), slice(0, ROWS), CAUSAL),)
    gradient = GradientSum(dout, q, out, lse, make_call(kernel), [tiles])
    dk, dv = gradient.add(tiles, k, v)
    assert kernel.backward.call_count == calls
    whole = KERNELS["reference"].backward(dout, q, k, v, out, lse, mask=CAUSAL, softmax_scale=SCALE)
    torch.testing.assert_close((gradient.dq(), dk, dv), whole, rtol=0, atol=0)
    torch.testing.assert_close(whole, tuple(expected), rtol=0, atol=1e-13)


def test_rows_that_see_other_keys_than_others():
    # A causal square from three tiles: the second half of the rows has two results.
    q, k, v, dout = make_tensors(ROWS, ROWS, torch.float64, (4, 2))
    out, lse, dq, dk, dv = attention(q, k, v, dout, torch.ones(ROWS, ROWS).tril().bool())
    half = slice(0, 6), slice(6, 12)
    tiles = (
        Tile(half[1], half[0], FULL), Tile(half[1], half[1], CAUSAL), Tile(half[0], half[0], CAUSAL)
    )  # fmt: skip
    total = AttentionSum(q, make_call(), [tiles])
    total.add(tiles, k, v)
    gradient = GradientSum(dout, q, out, lse, make_call(), [tiles])
    shares = gradient.add(tiles, k, v)
    got = (*total.result(), gradient.dq(), *shares)
    torch.testing.assert_close(got, (out, lse, dq, dk, dv), rtol=0, atol=1e-13)


class Constant:
    """A kernel whose results and gradients are the numbers it is given, in turn."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def forward(self, q, k, v, **options):
        return torch.full_like(q, next(self.numbers)), q[..., 0].float() * 0

    def backward(self, dout, q, k, v, out, lse, **options):
        number = next(self.numbers)
        return tuple(torch.full_like(t, number) for t in (q, k, v))


def sums_of(kernel, num_portions, rows_of_keys=1):
    """AttentionSum and GradientSum over portions of one tile each, in bf16, and k, v of one."""
    q = torch.zeros(1, 1, 4, 8, dtype=BF16)
    k = torch.zeros(1, 1, rows_of_keys, 8, dtype=BF16)
    tiles = (Tile(slice(0, 4), slice(0, rows_of_keys), FULL),)
    call, plan = make_call(kernel), num_portions * [tiles]
    return (
        AttentionSum(q, call, plan), GradientSum(q, q, q, q[..., 0], call, plan), tiles, k
    )  # fmt: skip


def test_more_than_two_results_are_summed_in_fp32():
    # Eight results of equal weight: their mean is 1 + 7 / 1024, nearest to the bf16 after 1. In
    # bf16 each moves the mean by less than half a step.
    after_one = 1 + 2**-7
    total, _, tiles, k = sums_of(Constant(1, *7 * [after_one]), 8)
    for _ in range(8):
        total.add(tiles, k, k)
    out, lse = total.result()
    torch.testing.assert_close(out, torch.full((1, 1, 4, 8), after_one, dtype=BF16), rtol=0, atol=0)
    torch.testing.assert_close(lse, torch.full((1, 1, 4), 8.0).log())


@pytest.mark.parametrize(("shares", "total"), [((256, 3), 260), ((256, 1, 1), 258)])
def test_gradients_are_rounded_once(shares, total):
    # 259 lies between the bf16 numbers 258 and 260, and goes to the even one; 256 + 1 to 256.
    _, gradient, tiles, k = sums_of(Constant(*shares), len(shares))
    for _ in shares:
        gradient.add(tiles, k, k)
    dq = gradient.dq()
    torch.testing.assert_close(dq, torch.full((1, 1, 4, 8), total, dtype=BF16), rtol=0, atol=0)


def test_many_tiles_without_a_common_row():
    # More than are kept until all have come.
    q = torch.zeros(1, 1, 12, 8, dtype=BF16)
    tiles = tuple(Tile(slice(i, i + 1), slice(0, 1), FULL) for i in range(12))
    gradient = GradientSum(q, q, q, q[..., 0], make_call(Constant(*range(12))), [tiles])
    dk, dv = gradient.add(tiles, q[:, :, :1], q[:, :, :1])
    rows = torch.arange(12.0)[:, None].expand(1, 1, 12, 8)
    torch.testing.assert_close(gradient.dq(), rows.to(BF16), rtol=0, atol=0)
    # The key is in all tiles: its share is a sum, in fp32.
    assert sums_keys(tiles)
    torch.testing.assert_close((dk, dv), 2 * (torch.full((1, 1, 1, 8), 66.0),), rtol=0, atol=0)


def test_a_share_that_is_no_sum_has_the_dtype_of_the_keys():
    q = torch.zeros(1, 1, 4, 8, dtype=BF16)
    tiles = tuple(Tile(slice(0, 4), slice(i, i + 1), FULL) for i in (2, 0))
    gradient = GradientSum(q, q, q, q[..., 0], make_call(Constant(5, 6)), [tiles])
    dk, dv = gradient.add(tiles, q, q)
    assert not sums_keys(tiles)
    expected = torch.tensor([6, 0, 5, 0], dtype=BF16)[:, None].expand(1, 1, 4, 8)
    torch.testing.assert_close((dk, dv), (expected, expected), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_assemble_adds_at_most_two_parts_to_a_cell(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    like = torch.empty(2, 5, 9, 3, dtype=BF16)
    parts, expected = [], torch.zeros(like.shape)
    for _ in range(2):  # each layer adds to a cell at most once
        for heads in rng.sample(cut(5, 2, rng), rng.randint(1, 2)):
            for rows in rng.sample(found := cut(9, 3, rng), rng.randint(1, len(found))):
                part = torch.randn(
                    2, heads.stop - heads.start, rows.stop - rows.start, 3, generator=generator
                ).to(BF16)
                parts.append((heads, rows, part))
                expected[:, heads, rows] += part
    rng.shuffle(parts)
    # The fp32 sum of two bf16 numbers, rounded once: exactly.
    torch.testing.assert_close(assemble(like, parts), expected.to(BF16), rtol=0, atol=0)


def test_assemble_of_nothing_and_of_one_part():
    like = torch.full((1, 2, 3, 4), torch.nan, dtype=BF16)
    torch.testing.assert_close(assemble(like, []), torch.zeros_like(like), rtol=0, atol=0)
    part = torch.ones(like.shape)
    whole = assemble(like, [(slice(0, 2), slice(0, 3), part)])
    torch.testing.assert_close(whole, part.to(BF16), rtol=0, atol=0)


def block(rows, heads, number):
    return torch.full((rows, 2, 1, heads, 3), number, dtype=BF16)


@pytest.mark.parametrize("num_shares", [2, 3])
def test_shares_of_own_keys(num_shares):
    """Own shares by halves of the heads, others' for some rows; keys and values apart."""
    k = torch.zeros(1, 4, 6, 3, dtype=BF16)
    sums = KeySum(k, num_shares)
    expected = torch.zeros(2, 1, 4, 6, 3)
    for i, heads in enumerate((slice(0, 2), slice(2, 4))):
        own = torch.full((1, 2, 6, 3), 256.0 + 2 * i, dtype=BF16)
        sums.add_own(own, own + 2, heads)
        expected[0, :, heads] += 256 + 2 * i
        expected[1, :, heads] += 258 + 2 * i
    arriving = [(slice(1, 4), 1.0), (slice(2, 6), 1.0)][: num_shares - 1]
    for rows, number in arriving:
        sums.add_block(rows, block(rows.stop - rows.start, 4, number))
        expected[:, :, :, rows] += number
    got = torch.stack(sums.result())
    torch.testing.assert_close(got, expected.to(BF16), rtol=0, atol=0)


def test_a_block_of_some_heads():
    k = torch.zeros(1, 4, 6, 3, dtype=BF16)
    for num_shares in (1, 5):
        sums = KeySum(k, num_shares)
        sums.add_block(slice(2, 4), block(2, 1, 7.0), slice(3, 4))
        expected = torch.zeros_like(k)
        expected[:, 3, 2:4] = 7
        torch.testing.assert_close(sums.result(), (expected, expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fetched", "expected"),
    [
        (8, 4, 64, [(slice(0, 4), slice(0, 2)), (slice(4, 8), slice(2, 4))]),
        (9, 3, 64, [(slice(0, 3), slice(0, 1)), (slice(3, 9), slice(1, 3))]),
        (4, 4, 16, [(slice(0, 2), slice(0, 2)), (slice(2, 4), slice(2, 4))]),
        (8, 1, 64, [(slice(0, 8), slice(0, 1))]),  # one key head: nothing to split
        (8, 4, 15, [(slice(0, 8), slice(0, 4))]),  # under a quarter travels: little to hide
        (8, 4, 0, [(slice(0, 8), slice(0, 4))]),  # one rank: nothing to hide
    ],
)
def test_heads_are_split_in_halves(heads, kv_heads, fetched, expected):
    assert split_heads(torch.empty(1, kv_heads, 64, 8), heads, fetched) == expected
