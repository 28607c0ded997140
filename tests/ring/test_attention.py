"""The ring on 1, 2 and 4 gloo ranks against attention written down in fp64.

Each world is started once and computes all cases; the parent puts the shards together and compares
whole tensors.
"""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from extend.errors import CompatibilityError, ExtendError, LayoutError, RecipeError
from extend.ring import LAYOUTS, ring_attention, shard, unshard
from extend.ring.attention import Ring, _backward
from extend.ring.comm import RingComm
from extend.ring.kernels import KERNELS
from extend.ring.schedule import Schedule
from tests.spawn import spawn

WORLDS = [1, 2, 4]
SEQ_LEN, NUM_HEADS, HEAD_DIM = 184, 6, 32  # 184 = 23 * 8: no power of two, divides for 4 ranks
HEADS = {"MHA": 6, "GQA": 2, "MQA": 1}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
NAMES = ("out", "dq", "dk", "dv")
CASES = list(itertools.product(LAYOUTS, HEADS, DTYPES, (True, False)))


def make_inputs(num_kv_heads, dtype):
    """q, k, v and dout, rounded to `dtype`, of a batch of 2."""
    generator = torch.Generator().manual_seed(num_kv_heads)
    heads = (NUM_HEADS, num_kv_heads, num_kv_heads, NUM_HEADS)
    return [
        torch.randn(2, h, SEQ_LEN, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for h in heads
    ]


@functools.cache
def attention_in_fp64(heads, dtype, causal):
    """out, dq, dk, dv from the definition and autograd."""
    q, k, v, dout = make_inputs(HEADS[heads], DTYPES[dtype])
    q, k, v = (t.double().detach().requires_grad_() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT / HEAD_DIM**0.5
    if causal:
        future = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())


@functools.cache
def one_flash_call(heads, dtype, causal):
    """out, dq, dk, dv of torch's own kernel on the whole sequence."""
    q, k, v, dout = make_inputs(HEADS[heads], DTYPES[dtype])
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def run_ring(rank, world, layout, inputs, **options):
    """out, dq, dk, dv of this rank's part."""
    q, k, v, dout = (shard(t, 2, layout, rank, world) for t in inputs)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = ring_attention(q, k, v, layout=layout, **options)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


def run_cases(rank, world):
    return {
        (layout, heads, dtype, causal): run_ring(
            rank, world, layout, make_inputs(HEADS[heads], DTYPES[dtype]), causal=causal
        )
        for layout, heads, dtype, causal in CASES
    }


@pytest.fixture(scope="module", params=WORLDS)
def shards(request):
    return spawn(request.param, run_cases)


@pytest.mark.parametrize(("layout", "heads", "dtype", "causal"), CASES)
def test_ring_equals_attention_over_the_whole_sequence(shards, layout, heads, dtype, causal):
    expected = attention_in_fp64(heads, dtype, causal)
    baseline = one_flash_call(heads, dtype, causal)
    for i, name in enumerate(NAMES):
        parts = [shard_of_rank[layout, heads, dtype, causal][i] for shard_of_rank in shards]
        assert all(part.dtype == DTYPES[dtype] for part in parts)
        flash_error = (baseline[i].double() - expected[i]).abs().max().item()
        tolerance = {
            # What blocks in bf16 cost: 2.5 times one call's error, plus 2e-3 (the design's gate).
            "bf16": 2.5 * flash_error + 2e-3,
            # Values are of order 1 to 10 and sums have 184 terms: some tens of fp32 roundings.
            "fp32": 1e-5,
            # No step of the ring may be worse than fp64 when the inputs are.
            "fp64": 1e-12,
        }[dtype]
        torch.testing.assert_close(
            unshard(parts, 2, layout).double(), expected[i], rtol=0, atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def test_memory_is_that_of_the_local_length():
    results = spawn(2, record_largest_tensors, 4096)
    local_len, heads, head_dim = 2048, 4, 8
    for largest, saved in results:
        # K and V of all local positions in one buffer, or q: nothing longer, nothing squared.
        assert largest == 2 * heads * local_len * head_dim
        assert sorted(saved) == sorted(4 * [heads * local_len * head_dim] + [heads * local_len])


def record_largest_tensors(rank, world, seq_len):
    q, k, v = (torch.randn(1, 4, seq_len // world, 8, requires_grad=True) for _ in range(3))
    saved = []
    with NumelRecorder() as recorder:
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        )
        with hooks:
            out = ring_attention(q, k, v)
        out.backward(torch.ones_like(out))
    return recorder.largest, saved


class NumelRecorder(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


def test_no_hop_without_a_use():
    counts = spawn(4, count_hops)
    # Contiguous: keys of rank r go on to the 3 - r later ranks, in forward and again in backward;
    # the sums of their gradients follow and come home, 3 - r hops too, the last one direct.
    assert [sent["contiguous"]["keys"] for sent in counts] == [2 * 1, 2 * 2, 2 * 3, 0]
    assert sum(sent["contiguous"]["gradients"] for sent in counts) == 3 + 2 + 1
    # Zigzag: keys visit all other ranks in 3 hops; their gradients make 3, way home included.
    assert [sent["zigzag"] for sent in counts] == 4 * [{"keys": 2 * 3, "gradients": 3}]


def count_hops(rank, world):
    sent = {}
    for layout in ("contiguous", "zigzag"):
        inputs = [t[:, :, : 8 * world] for t in make_inputs(2, torch.bfloat16)]
        with RecordSends() as sends:
            run_ring(rank, world, layout, inputs)
        sent[layout] = sends.count
    return sent


def test_shares_of_a_gradient_are_summed_in_fp32():
    for gradients in spawn(2, sum_shares):
        for gradient in gradients:
            # 257 has no bf16: a sum kept or sent in bf16 would stay at 256.
            torch.testing.assert_close(gradient, torch.full((1, 1, 4, 8), 257.0))


def sum_shares(rank, world):
    comm = RingComm()
    schedule = Schedule(LAYOUTS["contiguous"], rank, world, local_len=4, causal=False)
    ring = Ring(comm, schedule, OwnBlockWeighsMore(rank), softmax_scale=1.0)
    # The keys carry the number of the rank that they started on.
    q, k = torch.zeros(1, 1, 4, 8), torch.full((1, 1, 4, 8), float(rank))
    q, k = q.bfloat16(), k.bfloat16()
    return _backward(q, q, k, k, q, q[..., 0].float(), ring)


class OwnBlockWeighsMore(NamedTuple):
    """A kernel whose gradients are 256 for a rank's own keys and 1 for any others."""

    rank: int

    def backward(self, dout, q, k, v, out, lse, **options):
        share = torch.full_like(k, 256.0 if k[0, 0, 0, 0] == self.rank else 1.0)
        return share, share, share


class RecordSends(TorchDispatchMode):
    """Counts sends: keys travel in bf16, gradients in fp32."""

    def __init__(self):
        super().__init__()
        self.count = {"keys": 0, "gradients": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d.send.default:
            kind = "gradients" if args[0][0].dtype == torch.float32 else "keys"
            self.count[kind] += 1
        return func(*args, **(kwargs or {}))


def test_gradient_of_a_plain_sum():
    # The incoming gradient is one expanded number: no stride of it is that of a real tensor.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 8, generator=generator, requires_grad=True) for _ in range(3))
    ring_attention(q, k, v).sum().backward()
    # Each row of softmax weights sums to 1, so dv sums to the number of queries, per channel.
    expected = torch.full((1, 2, 8), 16.0)
    torch.testing.assert_close(v.grad.sum(2), expected)


def test_autocast_casts_like_torch_attention():
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    v = torch.randn(1, 2, 16, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ring_attention(q, k, v)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected)  # bf16 both: the default tolerance is one rounding


def tensors(q=(1, 4, 8, 8), k=(1, 2, 8, 8), v=(1, 2, 8, 8)):
    return torch.zeros(q), torch.zeros(k), torch.zeros(v)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"k": (1, 3, 8, 8), "v": (1, 3, 8, 8)}, "4 query heads are no multiple of 3"),
        ({"q": (1, 4, 6, 8)}, r"q \(1, 4, 6, 8\), k \(1, 2, 8, 8\).*same local length"),
        ({"v": (1, 2, 8, 4)}, "do not fit"),
        ({"q": (4, 8, 8)}, "do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(CompatibilityError, match=message):
        ring_attention(*tensors(**shapes))


def test_what_is_not_supported_yet_is_refused_by_name():
    with pytest.raises(ExtendError, match="window is not supported yet by kernel 'auto'"):
        ring_attention(*tensors(), window=4)
    with pytest.raises(ExtendError, match="cu_seqlens is not supported yet"):
        ring_attention(*tensors(), cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))
    with pytest.raises(LayoutError, match="length 7 must be a multiple of 2 x 1 ranks = 2"):
        ring_attention(*tensors((1, 4, 7, 8), (1, 2, 7, 8), (1, 2, 7, 8)))
    with pytest.raises(RecipeError, match="layout: unknown 'zigzags'; did you mean 'zigzag'"):
        ring_attention(*tensors(), layout="zigzags")
    with pytest.raises(CompatibilityError, match=r"k torch.float64 on cpu"):
        ring_attention(tensors()[0], tensors()[1].double(), tensors()[2])
    assert set(KERNELS) >= {"reference", "flash_cpu", "flash", "cudnn"}
