import pytest
import torch

from extend.errors import CompatibilityError, RecipeError
from extend.ring.kernels import KERNELS, choose_kernel

ON_CPU = ["reference", "flash_cpu"]
ON_CUDA = ["flash", "cudnn", "efficient"]
# Blocks as layouts cut them from 20 queries and keys: whole, zigzag's two, striped's shifted one.
BLOCKS = [
    (slice(None), slice(None), True),
    (slice(None), slice(0, 10), False),
    (slice(10, None), slice(None), False),
    (slice(1, None), slice(0, -1), True),
]


def make_block(queries, keys, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    # [b, s, h, d] in memory, as models hand it over
    q, dout = (torch.randn(2, 20, 4, 8, generator=generator, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(2, 20, 2, 8, generator=generator, dtype=dtype) for _ in range(2))
    q, k, v, dout = (t.transpose(1, 2) for t in (q, k, v, dout))
    return q[:, :, queries], k[:, :, keys], v[:, :, keys], dout[:, :, queries]


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize(("queries", "keys", "causal"), BLOCKS)
def test_block_against_autograd(name, queries, keys, causal):
    q, k, v, dout = make_block(queries, keys)
    out, lse = KERNELS[name].forward(q, k, v, causal=causal, softmax_scale=0.3)
    grads = KERNELS[name].backward(
        dout, q, k, v, out, lse, causal=causal, softmax_scale=0.3
    )
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    for grad, reference in zip(grads, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("name", ON_CPU)
def test_backward_uses_the_supplied_out_and_lse(name):
    # Gradients of attention over all keys are the sum of what two halves of the keys give when
    # each is handed the global out and lse: the fact that the ring rests on.
    q, k, v, dout = make_block(slice(None), slice(None))
    kernel, options = KERNELS[name], {"causal": False, "softmax_scale": 0.3}
    out, lse = kernel.forward(q, k, v, **options)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, **options)
    halves = [slice(0, 10), slice(10, None)]
    parts = [
        kernel.backward(dout, q, k[:, :, half], v[:, :, half], out, lse.clone(), **options)
        for half in halves
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], dq)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 2), dk)
    torch.testing.assert_close(torch.cat([part[2] for part in parts], 2), dv)


@pytest.mark.parametrize("name", ON_CUDA)
@pytest.mark.parametrize(("queries", "keys", "causal"), BLOCKS)
def test_cuda_kernels_fit_the_operators_of_this_torch(name, queries, keys, causal):
    # On the meta device operators check their arguments and give shapes, without a GPU.
    q, k, v, dout = (t.to("meta") for t in make_block(queries, keys, torch.bfloat16))
    out, lse = KERNELS[name].forward(q, k, v, causal=causal, softmax_scale=0.3)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    grads = KERNELS[name].backward(
        dout, q, k, v, out, lse, causal=causal, softmax_scale=0.3
    )
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_auto_on_cpu_is_flash():
    q, k, _, _ = make_block(slice(None), slice(None))
    assert choose_kernel("auto", q, k) is KERNELS["flash_cpu"]


def test_a_kernel_that_does_not_take_the_tensors_says_why():
    q, k, _, _ = make_block(slice(None), slice(None))
    with pytest.raises(CompatibilityError, match="kernel 'cudnn' cannot compute .* runs on cuda"):
        choose_kernel("cudnn", q, k)
    with pytest.raises(CompatibilityError, match="on meta: flash_cpu runs on cpu"):
        choose_kernel("auto", q.to("meta"), k.to("meta"))
    with pytest.raises(RecipeError, match="kernel: unknown 'flsh'; did you mean 'flash'"):
        choose_kernel("flsh", q, k)


def test_cuda_limits_are_named():
    q = torch.empty(1, 4, 8, 12, device="meta")
    assert "float16, bfloat16" in _reason("cudnn", q)
    assert "multiple of 8 and at most 128, not 12" in _reason("cudnn", q.half())


def _reason(name, q):
    """What the kernel would say of such a tensor on a GPU."""

    class OnCuda:
        device, dtype, shape = torch.device("cuda"), q.dtype, q.shape

    return KERNELS[name].refuse(OnCuda(), OnCuda())
