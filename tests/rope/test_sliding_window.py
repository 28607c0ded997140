"""An attention window shorter than the target is refused, dropped or kept as asked."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MinistralConfig, MistralConfig, Qwen2Config

from extend.errors import CompatibilityError
from extend.model_config import read_config
from extend.rope import rescale
from tests.rope.conftest import NATIVE, SIZES, edit_config
from tests.rope.test_bad_input import TARGET, check_refused


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def windowed(directory: Path, family: str) -> Path:
    """A model whose layers see 64 tokens only."""
    torch.manual_seed(0)
    sizes = {**SIZES, "sliding_window": 64, "head_dim": 16,
             "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = {"mistral": lambda: MistralConfig(**sizes),
              "ministral": lambda: MinistralConfig(
                  **sizes, layer_types=["sliding_attention", "full_attention"]),
              "qwen2": lambda: Qwen2Config(**sizes, use_sliding_window=True, max_window_layers=1),
              }[family]()
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


FAMILIES = ["mistral", "ministral", "qwen2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sliding_window_is_refused(family, tmp_path):
    model = windowed(tmp_path / "model", family)
    with pytest.raises(CompatibilityError, match=r"window of 64 tokens, below the target .* 1024"):
        rescale(model, tmp_path / "out", target_len=TARGET)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sliding_window_dropped_or_kept(family, tmp_path):
    model = windowed(tmp_path / "model", family)
    ids = torch.arange(200)[None] % 96
    logits = {}
    for choice in ("drop", "keep"):
        out = rescale(model, tmp_path / choice, target_len=NATIVE, sliding_window=choice)
        loaded = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
        assert loaded.config.model_type == family
        with torch.no_grad():
            logits[choice] = loaded(ids).logits
    unlimited = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager",
                                                     sliding_window=1000)
    original = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    with torch.no_grad():
        # Same weights, same kernel, same masks: equal but for the order of fp32 sums.
        torch.testing.assert_close(logits["drop"], unlimited(ids).logits)
        torch.testing.assert_close(logits["keep"], original(ids).logits)
    assert (logits["drop"] - logits["keep"]).abs().max() > 1e-3
    assert read_config(tmp_path / "drop").sliding_window is None
    keys = {k: v for k, v in read(tmp_path / "drop" / "config.json").items() if "window" in k}
    assert keys == {
        "mistral": {"sliding_window": None}, "ministral": {"sliding_window": 64},
        "qwen2": {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 2},
    }[family]
    assert read_config(tmp_path / "keep").sliding_window == 64


def test_dropping_an_unknown_kind_of_window(damaged, tmp_path):
    edit_config(damaged, sliding_window=64, model_type="gemma2")
    check_refused(damaged, tmp_path, CompatibilityError, "add layer_types", sliding_window="drop")


def test_a_window_that_is_off_or_long_enough_is_left_alone(damaged, tmp_path):
    edit_config(damaged, sliding_window=64, use_sliding_window=False)
    off = rescale(damaged, tmp_path / "off", target_len=TARGET)
    assert read(off / "config.json")["sliding_window"] == 64
    edit_config(damaged, sliding_window=TARGET, use_sliding_window=True)
    wide = rescale(damaged, tmp_path / "wide", target_len=TARGET)
    assert read(wide / "config.json")["sliding_window"] == TARGET
