"""A loaded model under another RoPE is the model that a checkpoint with it loads as."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from extend.errors import CompatibilityError
from extend.rope import rescale
from extend.rope.live import set_rope
from tests.rope.conftest import NATIVE
from tests.rope.specs import ANY_BASE, TINY, call, options_for

TARGET = 4 * NATIVE
TWO_LISTS = {"long_factor": [1.0] * 4 + [4.0] * 4, "short_factor": [1.0] * 8,
             "attention_factor": 1.25}


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def logits(model, length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(length)[None] % 96).logits


@pytest.mark.parametrize(("method", "options"), [
    *((method, options_for(method, TINY)) for method in ANY_BASE), ("longrope", TWO_LISTS),
    ("yarn", {"resonance": True})], ids=lambda value: value if isinstance(value, str) else "")
def test_set_rope_equals_loading(method, options, llama, tmp_path):
    rescaled = load(rescale(llama, tmp_path / "out", target_len=TARGET, method=method, **options))
    model = load(llama)
    raw = json.loads((llama / "config.json").read_text())
    set_rope(model, raw, call(method, TINY, TARGET, **options), TARGET, torch.device("cpu"))
    for length in (40, TARGET, 40):  # a longrope with two lists goes there and back
        torch.testing.assert_close(logits(model, length), logits(rescaled, length), rtol=0, atol=0)


def test_what_is_set_can_be_set_back(llama):
    model = load(llama)
    before = logits(model, 100)
    raw = json.loads((llama / "config.json").read_text())
    set_rope(model, raw, call("yarn", TINY, TARGET), TARGET, torch.device("cpu"))
    assert (logits(model, 100) - before).abs().max() > 1e-3
    set_rope(model, raw, TINY, NATIVE, torch.device("cpu"))
    torch.testing.assert_close(logits(model, 100), before, rtol=0, atol=0)


def test_a_model_without_rope():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    raw = {"hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 64}
    with pytest.raises(CompatibilityError, match="has no module rotary_emb"):
        set_rope(model, raw, call("ntk", TINY, TARGET), TARGET, torch.device("cpu"))
