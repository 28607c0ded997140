"""The switches for a server: with them, engines read the base as they read the long model."""

import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from extend.adapter import extract
from extend.adapter_format.serving_files import (
    command_line,
    llama_cpp_flags,
    rope_override,
    sglang_override,
)
from extend.adapter_format.sidecar import RopeChange
from extend.doctor.findings import same_reading
from extend.doctor.readers import READERS, read_with
from extend.doctor.reading import ModelFiles
from extend.merge import merge
from extend.model_config import RopeSpec, parse_config, write_rope
from tests.adapter_format.tiny_models import LONG, NATIVE, edit_json

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "max_position_embeddings": 128, "rope_theta": 10000.0, "pad_token_id": 0}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], "rope_local_base_freq": 10000.0,
                    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "sliding_window": None},
    # A base that is scaled already: its keys must not outlive the override.
    "llama3": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": {
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}
ROPES = {
    "plain": {}, "yarn": YARN, "linear": {"rope_type": "linear", "factor": 8.0},
    "yarn by parts": {**YARN, "attention_factor": 1.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 128,
                 "short_factor": [2.0] * 8, "long_factor": [2.0] * 8}}
PAIRS = [(family, rope) for family in BASES for rope in ROPES
         if not (family == "phi3" and rope not in ("plain", "longrope"))]


def change(family: str, rope: str, directory) -> tuple[RopeChange, dict[str, Any], dict[str, Any]]:
    """The change, and the config.json of base (also written) and long model."""
    base = {"model_type": family, **SIZES, **BASES[family]}
    (directory / "config.json").write_text(json.dumps(base))
    spec = RopeSpec(rope_theta=250000.0, rotary_dim=16, original_len=128, scaling=ROPES[rope])
    long = write_rope(base, spec, 1024)
    path = directory / "config.json"
    return RopeChange.between(parse_config(base, path), parse_config(long, path)), base, long


def as_vllm(config: PretrainedConfig, override: dict[str, Any]) -> None:
    """vllm 0.33.0: `get_config` updates by all that is no dictionary and standardizes;
    `_apply_dict_overrides` sets the dictionaries."""
    config.update({k: v for k, v in override.items() if not isinstance(v, dict)})
    config.standardize_rope_params()
    for key, value in override.items():
        if isinstance(value, dict):
            setattr(config, key, value)


def as_sglang(config: PretrainedConfig, override: dict[str, Any]) -> None:
    """sglang 0.5.23: in order, a RoPE dictionary over the one before."""
    for key, value in override.items():
        current = getattr(config, key, None)
        if key in ("rope_scaling", "rope_parameters") and isinstance(value, dict) and isinstance(
                current, dict):
            value = {**current, **value}
        setattr(config, key, value)


ENGINES: dict[str, tuple[Callable, Callable]] = {
    "vllm": (as_vllm, rope_override), "sglang": (as_sglang, sglang_override)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("family", "rope"), PAIRS)
def test_override_gives_the_long_models_reading(engine, family, rope, tmp_path):
    made, _, long = change(family, rope, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    apply, override = ENGINES[engine]
    apply(config, json.loads(json.dumps(override(made))))
    found = {k: v for k, v in config.to_dict().items() if k != "rope_theta"}
    got = read_with(engine, ModelFiles(found, {}, {}))
    want = read_with(engine, ModelFiles(long, {}, {}))
    assert got.refusal == want.refusal and got.unknown == want.unknown
    if want.layers:
        assert same_reading(got, want), (got, want)


@pytest.mark.parametrize(("family", "rope"), PAIRS)
def test_config_keys_in_the_file_give_every_reader_the_long_rope(family, rope, tmp_path):
    made, base, long = change(family, rope, tmp_path)
    for reader in READERS:
        got = read_with(reader, ModelFiles({**base, **made.config_keys}, {}, {}))
        want = read_with(reader, ModelFiles(long, {}, {}))
        assert got.refusal == want.refusal and got.unknown == want.unknown, reader
        assert not want.layers or same_reading(got, want), reader


@pytest.mark.parametrize(("rope", "flags"), [
    ("plain", "--rope-scaling none --rope-freq-base 250000"),
    ("linear", "--rope-scaling linear --rope-scale 8 --rope-freq-base 250000"),
    ("yarn", "--rope-scaling yarn --rope-scale 8 --yarn-orig-ctx 128 --yarn-beta-fast 32 "
             "--yarn-beta-slow 1 --rope-freq-base 250000"),
    ("yarn by parts", None), ("llama3", None), ("longrope", None)])
def test_llama_cpp_switches(rope, flags):
    spec = RopeSpec(rope_theta=250000.0, rotary_dim=16, original_len=128, scaling=ROPES[rope])
    assert llama_cpp_flags(spec) == (flags and flags.split())


def test_extract_writes_how_to_serve_it(llama, tmp_path):
    out = extract(llama.base, llama.tuned, tmp_path / "adapter", rank=12)
    serving = json.loads((out / "serving.json").read_text())
    text = (out / "SERVING.md").read_text()
    assert serving["max_model_len"] == LONG
    vllm = serving["engines"]["vllm"]
    line = command_line(vllm)
    assert shlex.split(line) == [
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", "vllm", "serve", str(llama.base), "--enable-lora",
        "--lora-modules", "long=ADAPTER_DIR", "--max-model-len", str(LONG), "--hf-overrides",
        json.dumps(serving["rope_override"]), "--max-lora-rank", "16"]
    assert line in text and command_line(serving["engines"]["sglang"]) in text
    assert serving["engines"]["sglang"]["command"][-1] == "12"
    assert serving["unserved"]["tensors"] == 7  # five norms, the embedding, the head
    assert serving["config_keys"]["max_position_embeddings"] == LONG


def test_no_long_switch_where_the_tokenizer_takes_the_length(copies, tmp_path):
    edit_json(copies.base / "tokenizer_config.json", model_max_length=LONG)
    out = extract(copies.base, copies.tuned, tmp_path / "adapter", rank=4)
    assert "environment" not in json.loads((out / "serving.json").read_text())["engines"]["vllm"]


def test_merge_writes_how_to_serve_it(llama, tmp_path):
    out = extract(llama.base, llama.tuned, tmp_path / "adapter", rank=4)
    merged = merge(out, llama.target, tmp_path / "merged")
    serving = json.loads((merged / "serving.json").read_text())
    assert serving["kind"] == "checkpoint" and serving["max_model_len"] == LONG != NATIVE
    for engine in serving["engines"].values():
        assert command_line(engine) in (merged / "SERVING.md").read_text()
