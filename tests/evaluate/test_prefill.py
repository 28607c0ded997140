"""Whole models with evaluation's attention against transformers' eager attention and masks."""

import json

import pytest
import torch
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from extend.errors import CompatibilityError
from extend.evaluate.attention import register_prefill_attention
from extend.evaluate.load import load_model
from extend.loading import cache_argument
from tests.ring.tiny_models import SEQ_LEN, VOCABULARY, WINDOWED, make_ids, make_model

NAMES = ["llama", "mistral", *WINDOWED]
# fp32: both sum the same products in another order; logits are of size 1 to 10, eps is 1.2e-7.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def both(name):
    """The same weights with evaluation's attention and with transformers' own."""
    return (make_model(name, attention).eval()
            for attention in (register_prefill_attention(), "eager"))


def read(model, ids, cache, sizes):
    """Logits of all tokens, read in parts of `sizes`."""
    with torch.inference_mode():
        return torch.cat([model(part, use_cache=True, **{cache_argument(model): cache}).logits
                          for part in ids.split(sizes, dim=1)], dim=1)


def expected_logits(reference, ids):
    with torch.no_grad():
        return reference(ids, use_cache=False).logits


@pytest.mark.parametrize("sizes", [[64], [24, 24, 16], [40, 1, 23], [1, 63], [3] * 21 + [1]])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_one_eager_forward(name, sizes):
    model, reference = both(name)
    ids = make_ids()
    cache = DynamicCache(config=model.config)
    torch.testing.assert_close(read(model, ids, cache, sizes), expected_logits(reference, ids),
                               **TOLERANCE)
    # Layers with a window forgot what no later token sees, so keys were fewer than tokens.
    assert any(layer.is_sliding for layer in cache.layers) == (name in WINDOWED)
    assert [layer.keys.shape[2] for layer in cache.layers] == [
        layer.sliding_window - 1 if layer.is_sliding else SEQ_LEN for layer in cache.layers]


@pytest.mark.parametrize("sizes", [[64], [24, 24, 16]])
@pytest.mark.parametrize("name", NAMES)
def test_generation_goes_on_after_prefill(name, sizes):
    model, reference = both(name)
    ids, cache = make_ids(), DynamicCache(config=model.config)
    logits = [read(model, ids, cache, sizes)]
    for _ in range(20):  # as many as the longest window, so that it leaves the prompt behind
        ids = torch.cat([ids, logits[-1][:, -1:].argmax(-1)], dim=1)
        logits.append(read(model, ids[:, -1:], cache, [1]))
    expected = expected_logits(reference, ids)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)
    torch.testing.assert_close(ids[:, SEQ_LEN:], expected[:, SEQ_LEN - 1:-1].argmax(-1))


def test_window_that_only_transformers_knows_of(tmp_path):
    """Without the key in config.json a Mistral has a window of 4096 tokens all the same.

    In fp64: over 4600 tokens, fp32 alone is off by 7e-5, eager attention as much as this one.
    """
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        initializer_range=0.5)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.pop("sliding_window") == 4096
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float64)
    reference = MistralForCausalLM.from_pretrained(tmp_path, attn_implementation="eager",
                                                   dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (1, 4600), generator=torch.Generator().manual_seed(0))
    expected = expected_logits(reference, ids)
    for sizes in ([4600], [2300, 2300]):
        cache = DynamicCache(config=model.config)
        # Eager attention takes its softmax in fp32 all the same, which is 1e-5 here; a window of
        # 4095 or 4097 moves logits by 0.4.
        torch.testing.assert_close(read(model, ids, cache, sizes), expected, rtol=0, atol=5e-5)


def test_window_that_a_model_keeps_to_itself_is_refused_where_it_binds():
    model, reference = (PhimoeForCausalLM._from_config(PhimoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, sliding_window=16,
        pad_token_id=0), attn_implementation=attention).eval()
        for attention in (register_prefill_attention(), "eager"))
    reference.load_state_dict(model.state_dict())
    ids = make_ids()[:, :16]
    torch.testing.assert_close(expected_logits(model, ids), expected_logits(reference, ids),
                               **TOLERANCE)
    for sizes in ([17], [9, 8]):
        with pytest.raises(CompatibilityError, match="sliding window of 16 tokens, which Phimoe"):
            read(model, make_ids()[:, :17], DynamicCache(config=model.config), sizes)
