"""Adapters of models whose layers differ in RoPE by type (Gemma 3)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from extend.adapter import extract
from extend.adapter_format.sidecar import read_sidecar
from extend.errors import CompatibilityError
from extend.merge import merge
from extend.model_config import read_config
from extend.rope import rescale
from tests.adapter_format.tiny_models import LONG, NATIVE, SIZES, edit_json, move, write_tokenizer

FULL, SLIDING = "full_attention", "sliding_attention"


def save(directory: Path, seed: int) -> Path:
    """The same base under every seed, and on it a fine-tune."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(
        **SIZES, head_dim=16, max_position_embeddings=NATIVE, sliding_window=32,
        layer_types=[SLIDING, FULL]))
    if seed:
        move(model, seed=seed, scale=0.01)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def models(tmp_path) -> tuple[Path, Path, Path]:
    """A base, its fine-tune under another RoPE, and a sibling."""
    tuned = rescale(save(tmp_path / "short", seed=2), tmp_path / "tuned", target_len=LONG,
                    method="yarn", sliding_window="keep")
    return save(tmp_path / "base", seed=0), tuned, save(tmp_path / "target", seed=3)


def test_a_merge_brings_the_rope_of_full_attention_only(models, tmp_path):
    base, tuned, target = models
    adapter = extract(base, tuned, tmp_path / "adapter", rank=64)
    change = read_sidecar(adapter).rope
    assert change.before["scaling"] == {}
    assert change.after["scaling"]["rope_type"] == "yarn"
    assert change.by_layer_type == {
        SLIDING: {**change.by_layer_type[SLIDING], "rope_theta": 10000.0, "scaling": {}}}
    assert change.config_keys["rope_local_base_freq"] == 10000.0
    out = merge(adapter, target, tmp_path / "out")
    wanted, found = read_config(tuned), read_config(out)
    assert (found.rope, found.rope_by_layer_type) == (wanted.rope, wanted.rope_by_layer_type)
    assert found.raw["rope_parameters"] == wanted.raw["rope_parameters"]
    assert found.sliding_window == 32
    loaded, long = (AutoModelForCausalLM.from_pretrained(d).model.rotary_emb for d in (out, tuned))
    for name, buffer in long.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name


def test_a_flat_target_gets_the_nested_keys(models, tmp_path):
    base, tuned, target = models
    raw = json.loads((target / "config.json").read_text())
    del raw["rope_parameters"]
    (target / "config.json").write_text(json.dumps(
        {**raw, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}))
    out = merge(extract(base, tuned, tmp_path / "adapter", rank=8), target, tmp_path / "out")
    assert read_config(out).rope == read_config(tuned).rope
    assert "sliding_window_pattern" not in read_config(out).raw


@pytest.mark.parametrize(("entry", "message"), [
    ({SLIDING: {"rope_type": "default", "rope_theta": 2e4}},
     "sliding_attention: RoPE rope_theta is 10000.0 in the adapter's base but 20000.0 in the tar"),
    ({FULL: {"rope_type": "default", "rope_theta": 2e6}},
     "RoPE rope_theta is 1000000.0 in the adapter's base but 2000000.0 in the target")])
def test_another_rope_is_refused(entry, message, models, tmp_path):
    base, tuned, target = models
    adapter = extract(base, tuned, tmp_path / "adapter", rank=8)
    parameters = json.loads((target / "config.json").read_text())["rope_parameters"]
    edit_json(target / "config.json", rope_parameters={**parameters, **entry})
    with pytest.raises(CompatibilityError, match=message):
        merge(adapter, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_long_lists_are_shown_in_part(models, tmp_path):
    from extend.merge.compat import rope_problems

    rope = read_config(models[0]).rope
    lists = [type(rope)(rope_theta=1e6, rotary_dim=16, original_len=NATIVE, scaling={
        "rope_type": "longrope", "long_factor": [float(i + j) for i in range(8)]})
        for j in (1, 2)]
    assert rope_problems(*lists) == [
        "RoPE long_factor is [1, 2, 3, 4, ... 8 in all] in the adapter's base but "
        "[2, 3, 4, 5, ... 8 in all] in the target"]
