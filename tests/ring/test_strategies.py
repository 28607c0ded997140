"""What strategies do beside the right numbers: heads, refusals, autograd, one call after another.

That the numbers are right is in test_attention.py, what is held and sent in test_traffic.py.
"""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

from extend.errors import CompatibilityError
from extend.ring import RingComm, ring_attention, shard, unshard
from extend.ring.call import Call
from extend.ring.kernels import KERNELS
from extend.ring.mask import Mask
from extend.ring.strategies import build_strategy, ulysses
from tests.ring.oracle import assert_is_attention, by_definition, make_inputs, run_ring, visible
from tests.spawn import spawn

FAMILIES = ("ring", "all-gather", "ulysses")


def run_heads(rank, world, cases):
    return {
        (strategy, heads): run_ring(rank, world, make_inputs(heads, "fp32"), strategy=strategy)
        for strategy, heads in cases
    }


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [("ulysses", "6:3"), ("ulysses", "MQA")]),
        (3, [("ulysses", "9:3"), ("all-gather", "9:3")]),
        (4, [("ulysses", "12:2"), ("ulysses", "MQA"), ("usp:2", "6:3"), ("usp:2", "MQA")]),
    ],
)
def test_odd_numbers_of_heads_are_shared_out(world, cases):
    by_rank = spawn(world, run_heads, cases)
    for case in cases:
        assert_is_attention([results[case] for results in by_rank], case[1])


def run_long(rank, world, strategy):
    """As for a sequence long enough for many groups; how many lanes of outputs that takes."""
    ulysses.GROUP_ROWS = 1
    lanes, publish = set(), RingComm.publish

    def note(comm, lane, *args):
        lanes.add(lane)
        return publish(comm, lane, *args)

    RingComm.publish = note
    results = run_ring(rank, world, make_inputs("MHA", "fp32"), strategy=strategy)
    return results, sum(lane.startswith("out") for lane in lanes)


@pytest.mark.parametrize(
    ("world", "strategy", "groups"), [(2, "ulysses", 4), (4, "ulysses", 2), (4, "usp:2", 4)]
)
def test_heads_of_a_long_sequence_travel_in_more_groups(world, strategy, groups):
    by_rank = spawn(world, run_long, strategy)
    assert_is_attention([results for results, _ in by_rank], "MHA")
    assert [found for _, found in by_rank] == world * [groups]


@pytest.mark.parametrize(
    ("kv_heads", "rows", "groups"),
    [(4, 1 << 21, 4), (4, 1 << 20, 2), (4, 1 << 10, 2), (3, 1 << 21, 3), (1, 1 << 21, 1),
     (6, 1 << 21, 3), (8, 1 << 25, 4), (5, 1 << 21, 1)],
)  # fmt: skip
def test_how_many_groups_of_heads(kv_heads, rows, groups):
    assert ulysses.num_groups(kv_heads, rows) == groups


def run_numbers(rank, world, strategies):
    results = [run_ring(rank, world, make_inputs("MHA", "fp32"), strategy=s) for s in strategies]
    q = torch.empty(1, 8, 4, 8)
    call = Call(RingComm(), "zigzag", Mask(), KERNELS["flash_cpu"], 1.0, 4 * world)
    usp, double = (build_strategy(name, call, q, q) for name in ("usp", "double-ring"))
    return results, (usp.comm.world, double.inner.world)


def test_any_number_that_divides_and_none_at_all():
    strategies = ["usp", "usp:1", "usp:4", "double-ring", "double-ring:1", "double-ring:4", "auto"]
    by_rank = spawn(4, run_numbers, strategies)
    for i, _ in enumerate(strategies):
        assert_is_attention([results[i] for results, _ in by_rank], "MHA")
    # On one host half of the ranks share heads, so a ring is left; the double ring is one ring.
    assert [found for _, found in by_rank] == 4 * [(2, 4)]


CANNOT_SPLIT = {  # (strategy, heads): of the message after the strategy's name
    ("ulysses", "6:3"): "6 query heads and 4 ranks; 4 ranks that share heads must divide both",
    ("usp:2", "9:3"): "9 query heads and 4 ranks; 2 ranks that share heads must divide both",
    ("usp:3", "6:3"): "6 query heads and 4 ranks; 3 ranks that share heads must divide both",
    ("usp:8", "MHA"): "8 query heads and 4 ranks; 8 ranks that share heads must divide both",
    ("usp", "9:3"): "no number between 1 and 4 divides 9 query heads and 4 ranks; use ring or "
                    "all-gather",
    ("double-ring:3", "MHA"): "4 ranks do not divide over 3 hosts; choose a number that divides 4",
}  # fmt: skip


def refused(rank, world):
    messages = {}
    for strategy, heads in CANNOT_SPLIT:
        with pytest.raises(CompatibilityError) as error:
            run_ring(rank, world, make_inputs(heads, "fp32"), strategy=strategy)
        messages[strategy, heads] = str(error.value)
    return messages, run_ring(rank, world, make_inputs("MHA", "fp32"), strategy="usp:2")


def test_what_cannot_be_split_is_refused_by_name():
    by_rank = spawn(4, refused)
    for messages, _ in by_rank:
        for case, message in CANNOT_SPLIT.items():
            assert messages[case] == f"strategy {case[0]}: {message}"
    assert_is_attention([result for _, result in by_rank], "MHA")  # and afterwards all is well


class FirstWeighsMore:
    """A kernel whose gradients are 256 from the queries of rank 0 and 1 from any others."""

    bands = packed = True

    def __init__(self, rank):
        self.share = 256.0 if rank == 0 else 1.0

    def refuse(self, q, k):
        return None

    def forward(self, q, k, v, **options):
        return torch.zeros_like(q), q[..., 0].float()

    def backward(self, dout, q, k, v, out, lse, **options):
        return tuple(torch.full_like(t, self.share) for t in (q, k, v))


def sum_shares(rank, world, strategy):
    KERNELS["first weighs more"] = FirstWeighsMore(rank)
    heads = world if strategy == "ulysses" else 1
    q = torch.zeros(1, heads, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    ring_attention(
        q, k, v, layout="contiguous", causal=False, strategy=strategy, kernel="first weighs more"
    ).sum().backward()
    return k.grad, v.grad


@pytest.mark.parametrize(
    ("strategy", "totals"),
    [
        # In bf16 the next number after 256 is 258: sums in it would stay at 256.
        ("ring", 3 * [258.0]),
        ("all-gather", 3 * [258.0]),
        ("ulysses", 3 * [258.0]),
        # 256 + 1 + 2 = 259 has no bf16 at home; the other host gets 257 as the bf16 256, and 1 + 1.
        ("double-ring:2", [260.0, 260.0, 258.0, 258.0]),
    ],
)
def test_shares_of_several_ranks_are_summed_in_fp32(strategy, totals):
    by_rank = spawn(len(totals), sum_shares, strategy)
    for (dk, dv), total in zip(by_rank, totals, strict=True):
        expected = torch.full((1, 1, 4, 8), total, dtype=torch.bfloat16)
        torch.testing.assert_close((dk, dv), (expected, expected), rtol=0, atol=0)


def plain_sum(rank, world):
    """The sums over this rank's positions of dv."""
    found = []
    for strategy in FAMILIES:
        generator = torch.Generator().manual_seed(rank)
        q, k, v = (
            torch.randn(1, 2, 16, 8, generator=generator, requires_grad=True) for _ in range(3)
        )
        ring_attention(q, k, v, strategy=strategy).sum().backward()
        found.append(v.grad.sum(2))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_gradient_of_a_plain_sum(world):
    # The incoming gradient is one expanded number: no stride of it is that of a real tensor. Each
    # row of softmax weights sums to 1, so dv sums to the number of queries, per channel.
    expected = torch.full((1, 2, 8), 16.0 * world)
    for by_strategy in zip(*spawn(world, plain_sum), strict=True):
        torch.testing.assert_close(sum(by_strategy), expected)


def autocast(rank, world):
    q, k, v, dout = (shard(t, 2, "zigzag", rank, world) for t in make_inputs("GQA", "fp32"))
    q, k = q.requires_grad_(), k.requires_grad_()
    v = v.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ring_attention(q, k, v)
    out.backward(dout.bfloat16())
    return out.detach(), q.grad, k.grad, v.grad


def test_autocast_casts_as_torch_attention_does():
    by_rank = spawn(2, autocast)
    q, k, v, dout = (t.detach() for t in make_inputs("GQA", "fp32"))
    q, k, v = q.requires_grad_(), k.requires_grad_(), v.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    out.backward(dout.bfloat16())
    for i, expected in enumerate((out.detach(), q.grad, k.grad, v.grad)):
        whole = unshard([part[i] for part in by_rank], 2, "zigzag")
        # The dtype is checked as well; a few roundings of bf16 numbers up to 5.
        torch.testing.assert_close(whole, expected, rtol=2**-6, atol=2**-6)


def run_reference(rank, world, under_autocast):
    found = []
    for strategy in FAMILIES:
        inputs = [shard(t, 2, "zigzag", rank, world) for t in make_inputs("GQA", "bf16")]
        q, k, v = (t.requires_grad_() for t in inputs[:3])
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            out = ring_attention(q, k, v, strategy=strategy, kernel="reference")
            out.backward(inputs[3])
        found.append((out.detach(), q.grad, k.grad, v.grad))
    return found


def test_autocast_stays_outside():
    # `reference` computes in fp32 what autocast would compute in bf16.
    inside, outside = (spawn(2, run_reference, enabled) for enabled in (True, False))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


CALLS = [  # heads, length and options of one call after the other
    ("GQA", 48, {}), ("MHA", 96, {}), ("GQA", 48, {"window": 5}), ("GQA", 48, {}),
    ("GQA", 48, {"cu_seqlens": (0, 7, 48)}), ("MQA", 32, {"causal": False}),
]  # fmt: skip


def call_again(rank, world):
    return {
        strategy: [
            run_ring(rank, world, make_inputs(heads, "fp32", seq_len), strategy=strategy, **options)
            for heads, seq_len, options in CALLS
        ]
        for strategy in FAMILIES
    }


def test_one_call_after_another_with_other_shapes_and_masks():
    by_rank = spawn(2, call_again)
    for strategy in FAMILIES:
        for i, (heads, seq_len, options) in enumerate(CALLS):
            assert_is_attention(
                [found[strategy][i] for found in by_rank], heads, seq_len, **options
            )


def two_groups(rank, world):
    """Forward in this rank's half, a whole call of all ranks, then backward in the half."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine, place = groups[rank % 2], rank // 2
    found = []
    for strategy in FAMILIES:
        heads = ("MHA", "GQA")[rank % 2]
        q, k, v, dout = (shard(t, 2, "zigzag", place, 2) for t in make_inputs(heads, "fp32"))
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        out = ring_attention(q, k, v, group=mine, strategy=strategy)
        among_all = run_ring(rank, world, make_inputs("MQA", "fp32"), strategy=strategy)
        out.backward(dout)
        found.append(((out.detach(), q.grad, k.grad, v.grad), among_all))
    return found


def test_groups_side_by_side_and_one_inside_the_other():
    by_rank = spawn(4, two_groups)
    for i, _ in enumerate(FAMILIES):
        assert_is_attention([by_rank[rank][i][0] for rank in (0, 2)], "MHA")
        assert_is_attention([by_rank[rank][i][0] for rank in (1, 3)], "GQA")
        assert_is_attention([found[i][1] for found in by_rank], "MQA")


def forget_a_group(rank, world):
    """Whether what is known of a group goes when it is destroyed."""
    gone = []
    for strategy in (*FAMILIES, "double-ring:2"):
        group = dist.new_group([0, 1])
        inputs = make_inputs("GQA", "fp32", 16)
        run_ring(rank, world, inputs, group=group, strategy=strategy)
        link = weakref.ref(RingComm(group).link)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        gone.append(link() is None)
    return gone


def test_no_strategy_keeps_a_group():
    assert spawn(2, forget_a_group) == 2 * [4 * [True]]


class WantsDenseRows:
    """flash_cpu, with the contract of kernels: of all tensors the last dimension is contiguous."""

    bands = packed = False

    def refuse(self, q, k):
        return None

    def forward(self, *tensors, **options):
        assert all(t.stride(-1) == 1 for t in tensors)
        return KERNELS["flash_cpu"].forward(*tensors, **options)

    def backward(self, dout, q, k, v, out, lse, **options):
        assert all(t.stride(-1) == 1 for t in (dout, q, k, v, out))
        return KERNELS["flash_cpu"].backward(dout, q, k, v, out, lse, **options)


def run_strided(rank, world):
    """Queries [b, s, h, d] in memory, keys and values in one tensor, dout in columns."""
    KERNELS["wants dense rows"] = WantsDenseRows()
    found = []
    for strategy in FAMILIES:
        q, k, v, dout = (shard(t, 2, "zigzag", rank, world) for t in make_inputs("GQA", "fp32"))
        q = q.transpose(1, 2).contiguous().requires_grad_()
        kv = torch.stack((k, v), -1).requires_grad_()  # no dimension of k and v is dense
        out = ring_attention(
            q.transpose(1, 2), *kv.unbind(-1), strategy=strategy, kernel="wants dense rows"
        )
        out.backward(dout.mT.contiguous().mT)
        found.append((out.detach(), q.grad.transpose(1, 2), *kv.grad.unbind(-1)))
    return found


def test_inputs_may_have_any_strides():
    by_rank = spawn(2, run_strided)
    for i, _ in enumerate(FAMILIES):
        assert_is_attention([found[i] for found in by_rank], "GQA")


def without_gradient(rank, world):
    found = []
    for strategy in FAMILIES:
        q, k, v, _ = (shard(t, 2, "zigzag", rank, world) for t in make_inputs("GQA", "fp32"))
        q.requires_grad_()
        with torch.no_grad():
            out = ring_attention(q, k, v, strategy=strategy)
        again = ring_attention(q, k, v, strategy=strategy)  # of three gradients one is asked for
        again.sum().backward()
        assert not out.requires_grad and again.requires_grad and k.grad is None
        found.append((out, again.detach(), q.grad))
    return found


def test_without_gradient():
    by_rank = spawn(2, without_gradient)
    q, k, v, dout = (t.double() for t in make_inputs("GQA", "fp32"))
    expected = by_definition(q, k, v, torch.ones_like(dout), visible(q.shape[2]))
    for i, _ in enumerate(FAMILIES):
        out, again, dq = (
            unshard([found[i][j] for found in by_rank], 2, "zigzag").double() for j in range(3)
        )
        torch.testing.assert_close(out, again, rtol=0, atol=0)
        # Sums of up to 144 fp32 products of order 1: some tens of roundings.
        torch.testing.assert_close((out, dq), expected[:2], rtol=0, atol=1e-5)
