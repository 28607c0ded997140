import types

import pytest
import torch

from extend.errors import CompatibilityError, RecipeError
from extend.ring.kernels import KERNELS, choose_kernel, cuda
from extend.ring.mask import ANTICAUSAL, CAUSAL, FULL, Mask, TileMask
from tests.ring.attention_oracle import (
    BANDS,
    CASES,
    PACKED,
    SCALE,
    SQUARES,
    allowed,
    attention,
    make_tensors,
    run,
)

ON_CPU = [("flash_cpu", case) for case in SQUARES] + [("reference", case) for case in CASES]
# Entries are of size 1 to 5. In half precision the gradients rest on dout . out, whose up to 96
# terms each hold an out rounded to 2^-9 (bf16) or 2^-12 (fp16): the errors add up to 10 of these.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 8e-3, "atol": 8e-3},
    torch.bfloat16: {"rtol": 6e-2, "atol": 6e-2},
}


def check(results, expected, dtype):
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == (torch.promote_types(dtype, torch.float32) if name == "lse" else dtype)
        torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "label"), ON_CPU)
def test_tile_against_written_out_attention(name, label):
    case = CASES[label]
    tensors = make_tensors(case.num_queries, case.num_keys)
    check(
        run(KERNELS[name], *tensors, case.mask), attention(*tensors, allowed(case)), torch.float64
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", "flash_cpu"])
@pytest.mark.parametrize("label", ["full, few keys", "causal", "anti-causal"])
def test_every_dtype(name, label, dtype):
    case = CASES[label]
    for heads, head_dim in (((4, 2), 12), ((3, 3), 96), ((6, 1), 16)):
        tensors = make_tensors(case.num_queries, case.num_keys, dtype, heads, head_dim=head_dim)
        results = run(KERNELS[name], *tensors, case.mask)
        check(results, attention(*tensors, allowed(case)), dtype)


@pytest.mark.parametrize("name", ["reference", "flash_cpu"])
def test_backward_uses_the_supplied_out_and_lse(name):
    # Gradients of attention over all keys are the sum of what tiles give when each is handed the
    # global out and lse: the fact that the ring rests on. A window of 13 over 24 tokens is two
    # causal squares and an anti-causal one.
    q, k, v, dout = make_tensors(24, 24)
    rows = torch.arange(24)
    seen = (rows <= rows.unsqueeze(1)) & (rows > rows.unsqueeze(1) - 13)
    out, lse, *expected = attention(q, k, v, dout, seen)
    head, tail = slice(0, 12), slice(12, 24)
    sums = [torch.zeros_like(t) for t in (q, k, v)]
    for ours, theirs, mask in (head, head, CAUSAL), (tail, tail, CAUSAL), (tail, head, ANTICAUSAL):
        parts = KERNELS[name].backward(
            dout[:, :, ours], q[:, :, ours], k[:, :, theirs], v[:, :, theirs], out[:, :, ours],
            lse[:, :, ours], mask=mask, softmax_scale=SCALE,
        )  # fmt: skip
        for total, part, at in zip(sums, parts, (ours, theirs, theirs), strict=True):
            total[:, :, at] += part
    for total, want in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, want, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["flash_cpu", "cudnn", "efficient"])
def test_a_band_never_reaches_a_kernel_without_bands(name):
    q, k, v, _ = make_tensors(8, 8)
    for mask in (TileMask(0, 3), TileMask(-1, None), TileMask(0, None, (0, 4, 8))):
        with pytest.raises(ValueError, match=r"a tile of 8 x 8 rows with TileMask.* fit_tiles"):
            KERNELS[name].forward(q, k, v, mask=mask, softmax_scale=1.0)
    with pytest.raises(ValueError, match="a tile of 7 x 8 rows"):
        KERNELS[name].forward(q[:, :, 1:], k, v, mask=CAUSAL, softmax_scale=1.0)


def test_what_kernels_take():
    takes = {name: (KERNELS[name].bands, KERNELS[name].packed) for name in KERNELS}
    squares_only = dict.fromkeys(("flash_cpu", "cudnn", "efficient"), (False, False))
    # Without a GPU the trial of a third-party kernel fails.
    absent = dict.fromkeys(("fa3", "fa4"), (False, False))
    everything = dict.fromkeys(("reference", "flash"), (True, True))
    if not torch.cuda.is_available():
        assert takes == squares_only | absent | everything


ON_META = [(name, case) for name in ("cudnn", "efficient") for case in SQUARES]
ON_META += [("flash", case) for case in CASES]


@pytest.mark.parametrize(("name", "label"), ON_META)
def test_cuda_kernels_fit_the_operators_of_this_torch(name, label):
    # On the meta device operators check their arguments and give shapes, without a GPU.
    case = CASES[label]
    q, k, v, dout = make_tensors(case.num_queries, case.num_keys, torch.bfloat16)
    q, k, v, dout = (t.to("meta") for t in (q, k, v, dout))
    out, lse, *grads = run(KERNELS[name], q, k, v, dout, case.mask)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert {t.dtype for t in (out, *grads)} == {torch.bfloat16}


class StandIn:
    """cuDNN's and the memory-efficient operators on CPU: what torch says they want and give."""

    def __init__(self):
        self.seen = []  # (query, key, value) as they came

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, compute_lse, dropout, causal, debug, *, scale
    ):
        assert bias is None and compute_lse and dropout == 0 and not debug
        assert k.shape[2] > 1 and (not causal or q.shape[2] == k.shape[2])
        self.seen.append((q, k, v))
        out, lse = reference("forward", q, k, v, causal=causal, scale=scale)
        return out, lse.unsqueeze(-1), None

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout,
        causal, *, scale,
    ):  # fmt: skip
        assert (max_q, max_k, cu_q, cu_k, bias) == (q.shape[2], k.shape[2], None, None, None)
        assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
        assert dout.stride() == out.stride() == q.stride()
        self.seen.append((q, k, v))
        return reference(
            "backward", dout, q, k, v, out, lse.squeeze(-1), causal=causal, scale=scale
        )

    def _scaled_dot_product_efficient_attention(
        self, q, k, v, bias, compute_lse, dropout, causal, *, scale
    ):
        assert bias is None and compute_lse and dropout == 0 and q.shape[1] == k.shape[1]
        out, lse = reference("forward", q, k, v, causal=causal, scale=scale)
        padding = torch.full((*lse.shape[:2], -lse.shape[2] % 32), float("nan"))
        return out, torch.cat((lse, padding), dim=2), None

    def _scaled_dot_product_efficient_attention_backward(
        self, dout, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale
    ):
        assert bias is None and dropout == 0 and wanted == [True, True, True, False]
        assert lse.shape[2] % 32 == 0 and q.shape[1] == k.shape[1]
        assert lse[:, :, q.shape[2] :].isposinf().all()
        lse = lse[:, :, : q.shape[2]]
        return *reference("backward", dout, q, k, v, out, lse, causal=causal, scale=scale), None


def reference(method, *tensors, causal, scale):
    mask = CAUSAL if causal else FULL
    return getattr(KERNELS["reference"], method)(*tensors, mask=mask, softmax_scale=scale)


@pytest.fixture
def stand_in(monkeypatch):
    operators = StandIn()
    monkeypatch.setattr(cuda, "aten", operators)
    return operators


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
@pytest.mark.parametrize("label", SQUARES)
def test_cuda_kernels_on_operators_that_stand_in(stand_in, name, label):
    case = CASES[label]
    tensors = make_tensors(case.num_queries, case.num_keys)
    check(
        run(KERNELS[name], *tensors, case.mask), attention(*tensors, allowed(case)), torch.float64
    )


def test_cudnn_gets_keys_and_values_where_they_lie(stand_in):
    q, k, v, dout = make_tensors(10, 10)
    run(KERNELS["cudnn"], q, k, v, dout, CAUSAL)
    assert len(stand_in.seen) == 2
    for received in stand_in.seen:
        for got, given in zip(received, (q, k, v), strict=True):
            assert got.data_ptr() == given.data_ptr() and got.stride() == given.stride()


def on_cuda(dtype, head_dim):
    """What `refuse` looks at of a tensor on a GPU."""
    return types.SimpleNamespace(
        device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 8, head_dim)
    )


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "reason"),
    [
        ("cudnn", torch.float32, 64, "takes float16, bfloat16"),
        ("cudnn", torch.float16, 12, "a multiple of 8 and at most 128, not 12"),
        ("cudnn", torch.bfloat16, 256, "at most 128, not 256"),
        ("cudnn", torch.bfloat16, 96, None),
        ("flash", torch.float32, 64, "takes float16, bfloat16"),
        ("flash", torch.bfloat16, 264, "a multiple of 8 and at most 256, not 264"),
        ("flash", torch.bfloat16, 256, None),
        ("flash", torch.float16, 96, None),
        ("fa4", torch.float32, 64, "takes float16, bfloat16"),
        ("fa3", torch.bfloat16, 260, "a multiple of 8 and at most 256, not 260"),
        ("efficient", torch.float64, 64, "takes float16, bfloat16, float32"),
        ("efficient", torch.float32, 12, None),
        ("efficient", torch.bfloat16, 12, "a multiple of 8, not 12"),
        ("efficient", torch.bfloat16, 1024, None),
        ("flash_cpu", torch.float32, 64, "runs on cpu"),
        ("reference", torch.float64, 7, None),
    ],
)
def test_limits_are_named(name, dtype, head_dim, reason):
    q = on_cuda(dtype, head_dim)
    said = KERNELS[name].refuse(q, q)
    assert said is None if reason is None else reason in said


def test_a_kernel_that_does_not_take_the_tensors_says_why():
    q, k, _, _ = make_tensors(8, 8)
    with pytest.raises(CompatibilityError, match="kernel 'cudnn' cannot compute .* runs on cuda"):
        choose_kernel("cudnn", q, k, mask=Mask())
    with pytest.raises(CompatibilityError, match=r"on meta: flash_cpu runs on cpu\. Cast or move"):
        choose_kernel("auto", q.to("meta"), k.to("meta"), mask=Mask())
    with pytest.raises(RecipeError, match="kernel: unknown 'flsh'; did you mean 'flash'"):
        choose_kernel("flsh", q, k, mask=Mask())


def test_cases_say_what_they_are():
    # The masks written beside the positions are the masks of the positions.
    for label, case in (BANDS | PACKED | SQUARES).items():
        mask, gaps = case.mask, torch.arange(case.num_queries).unsqueeze(1)
        gaps = gaps - torch.arange(case.num_keys)
        seen = gaps >= (-99 if mask.lo is None else mask.lo)
        seen &= gaps <= (99 if mask.hi is None else mask.hi)
        if case.documents:
            blocks = [torch.ones(n, n, dtype=torch.bool) for n in case.documents]
            seen &= torch.block_diag(*blocks).bool()
        assert torch.equal(seen, allowed(case)), label
        assert seen.any(0).all() and seen.any(1).all(), label
