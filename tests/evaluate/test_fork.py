"""Short rows after a shared cache against one eager forward of the whole row, for each of them."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from extend.errors import CompatibilityError
from extend.evaluate.attention import register_prefill_attention
from extend.evaluate.fork import Fork, attend_after, put_before
from extend.loading import cache_argument
from tests.evaluate.test_prefill import NAMES, TOLERANCE, both
from tests.ring.tiny_models import VOCABULARY, make_model

NUM_ROWS = 3


def draw(rows, length, seed):
    return torch.randint(VOCABULARY, (rows, length),
                         generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def read_shared(model, shared, rows, sizes=None):
    """Logits [rows, s, vocabulary] of `rows` read after `shared` [1, n], and the cache."""
    cache, argument = DynamicCache(config=model.config), cache_argument(model)
    for part in shared.split(sizes or shared.shape[1], dim=1):
        model(part, use_cache=True, **{argument: cache})
    with Fork(cache).shared() as fork:
        return model(rows, use_cache=True, **{argument: fork}).logits, cache


@pytest.mark.parametrize("length", [1, 12, 40])  # below, about and beyond the windows
@pytest.mark.parametrize("new", [1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_one_eager_forward_of_prefix_and_row(name, length, new):
    model, reference = both(name)
    shared, rows = draw(1, length, 1), draw(NUM_ROWS, new, 2)
    got, _ = read_shared(model, shared, rows)
    with torch.no_grad():
        whole = torch.cat([shared.expand(NUM_ROWS, -1), rows], dim=1)
        expected = reference(whole, use_cache=False).logits[:, length:]
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_reading_goes_on_as_if_no_question_had_been_asked(name):
    model, reference = both(name)
    shared, rows, rest = draw(1, 30, 1), draw(NUM_ROWS, 9, 2), draw(1, 21, 3)
    _, cache = read_shared(model, shared, rows)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    with torch.inference_mode(), Fork(cache).shared() as fork:
        model(rows, use_cache=True, **{cache_argument(model): fork})
    for layer, (keys, values) in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.get_seq_length() == 30
    with torch.inference_mode():
        got = model(rest, use_cache=True, **{cache_argument(model): cache}).logits
    with torch.no_grad():
        expected = reference(torch.cat([shared, rest], dim=1), use_cache=False).logits[:, 30:]
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_rows_do_not_see_each_other():
    model = make_model("gemma3 window", register_prefill_attention()).eval()
    shared, rows = draw(1, 30, 1), draw(NUM_ROWS, 9, 2)
    got, _ = read_shared(model, shared, rows)
    rows[1] = draw(1, 9, 4)
    changed, _ = read_shared(model, shared, rows)
    assert torch.equal(got[[0, 2]], changed[[0, 2]])
    assert not torch.equal(got[1], changed[1])


def test_half_precision_is_joined_in_fp32():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 16, generator=generator).bfloat16()
    k, v = torch.randn(2, 2, 2, 3, 16, generator=generator).bfloat16()
    before = tuple(torch.randn(2, 1, 2, 50, 16, generator=generator).bfloat16())
    out = attend_after(q, k, v, before, 0.25)
    keys, values = (torch.cat([old.expand(2, -1, -1, -1), new], dim=2).double()
                    for old, new in zip(before, (k, v), strict=True))
    mask = torch.ones(3, 53, dtype=torch.bool).tril(50)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), keys, values, mask, scale=0.25, enable_gqa=True)
    assert out.dtype == torch.bfloat16
    # bf16 keeps 8 bits: each partial result and the sum are rounded once, 2^-9 of size <= 3 each.
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("window", "kept"), [(1, 0), (2, 1), (5, 4), (6, 5), (9, 5)])
def test_a_window_takes_the_last_keys_only(window, kept):
    old = torch.arange(5.0).view(1, 1, 5, 1)
    new = torch.full((2, 1, 3, 1), 9.0)
    keys, values = put_before((old, -old), new, new, window)
    assert keys.shape == (2, 1, kept + 3, 1)
    assert keys[1, 0, :kept, 0].tolist() == list(range(5 - kept, 5))
    assert values[1, 0, :kept, 0].tolist() == [-x for x in range(5 - kept, 5)]


def test_what_cannot_be_shared_is_refused_by_name():
    class Recurrent(DynamicLayer):
        pass

    model = make_model("llama", register_prefill_attention()).eval()
    cache = DynamicCache(config=model.config)
    cache.layers[1] = Recurrent()
    with pytest.raises(CompatibilityError, match="layer 1 keeps Recurrent in its cache"):
        Fork(cache)


def test_attention_that_does_not_take_the_shared_keys_is_noticed():
    model = make_model("llama", register_prefill_attention()).eval()
    _, cache = read_shared(model, draw(1, 20, 1), draw(NUM_ROWS, 9, 2))
    with (pytest.raises(CompatibilityError, match="of 2 layers of this model, attention of 1 took"),
          Fork(cache).shared() as fork):
        fork.take(1)
