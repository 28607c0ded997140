from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from extend.errors import CompatibilityError
from extend.evaluate.attention import prefill_attention
from extend.ring.kernels.choose import CANDIDATES

# fp32: both sum the same products in another order; entries are of size 1, eps is 1.2e-7.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.mark.parametrize(("new", "cached"), [(1, 0), (33, 0), (1, 20), (16, 1), (40, 88)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 2, 17, 128])
@pytest.mark.parametrize("kernel", ["flash_cpu", "reference"])  # squares only, any band
def test_queries_are_the_last_positions(new, cached, heads, kv_heads, scaling, window, kernel,
                                        monkeypatch):
    monkeypatch.setitem(CANDIDATES, "cpu", (kernel,))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, new, 16, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, new + cached, 16, generator=generator)
    mask = torch.ones(new, new + cached, dtype=torch.bool).tril(cached)
    if window is not None:
        mask = mask.triu(cached - window + 1)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
    out, weights = prefill_attention(nn.Identity(), q, k, v, None, scaling=scaling,
                                     sliding_window=window)
    torch.testing.assert_close(out, expected.transpose(1, 2), **TOLERANCE)
    assert weights is None and out.is_contiguous()


def test_half_precision_is_joined_in_fp32():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 64, 16, generator=generator).bfloat16()
    mask = torch.ones(16, 64, dtype=torch.bool).tril(48)
    expected = scaled_dot_product_attention(q[:, :, 48:].double(), k.double(), v.double(), mask)
    out, _ = prefill_attention(nn.Identity(), q[:, :, 48:], k, v, None)
    assert out.dtype == torch.bfloat16
    # bf16 keeps 8 bits: each partial result and the sum are rounded once, 2^-9 of size <= 3 each.
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=1e-2, atol=1e-2)


def test_what_is_not_computed_is_refused():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(CompatibilityError, match="asks its attention for a mask"):
        prefill_attention(nn.Identity(), q, q, q, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(CompatibilityError, match="asks its attention for softcap"):
        prefill_attention(nn.Identity(), q, q, q, None, softcap=30.0)
    llama4 = nn.Identity()
    llama4.config = SimpleNamespace(layer_types=["full_attention", "chunked_attention"])
    llama4.layer_idx = 1
    with pytest.raises(CompatibilityError, match="layer 1 is of type 'chunked_attention'"):
        prefill_attention(llama4, q, q, q, None)
    llama4.layer_idx = 0
    assert prefill_attention(llama4, q, q, q, None)[0].shape == (1, 2, 1, 8)
