"""The written directory: same weights, agreeing config, the source untouched."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from extend.checkpoint import Checkpoint
from extend.manifest import MANIFEST_NAME, hash_content, hash_file, outputs_intact
from extend.model_config import read_config
from extend.rope import rescale
from extend.rope.frequencies import attention_factor, inv_freq
from tests.rope.conftest import NATIVE
from tests.rope.specs import ANY_BASE, TINY, options_for

TARGET = 4 * NATIVE


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", ANY_BASE)
def test_every_method_loads_and_generates(method, llama, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    out = rescale(llama, tmp_path / "out", target_len=TARGET, method=method,
                  **options_for(method, TINY))
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    spec = read_config(out).rope
    # transformers computes in fp32, where a power of theta is off by about 1e-6.
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), inv_freq(spec),
                               rtol=1e-5, atol=0)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(attention_factor(spec))
    assert model.config.max_position_embeddings == TARGET
    ids = torch.arange(1, NATIVE + 40)[None] % 96
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
    # More new tokens than a stale max_length of 256 would allow.
    generated = model.generate(ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert generated.shape == (1, ids.shape[1] + 3)
    warnings = [r.getMessage() for r in caplog.records if "rope" in r.getMessage().lower()
                and not r.name.startswith("extend")]
    assert warnings == []


def test_engines_that_read_otherwise_are_named_once(llama, tmp_path, caplog):
    out = rescale(llama, tmp_path / "long", target_len=TARGET, method="longrope",
                  long_factor=[2.0] * 8)
    assert [r.getMessage() for r in caplog.records] == [
        f"not every engine reads {out} alike: llama.cpp's converter drops rope_type longrope for "
        f"model_type 'llama', and the GGUF computes plain RoPE; `extend doctor {out}` shows all"]
    caplog.clear()
    for method in ("ntk-by-parts", "yarn", "critical"):
        rescale(llama, tmp_path / method, target_len=TARGET, method=method)
    assert not caplog.records


def test_weights_are_linked_and_the_rest_is_right(llama, tmp_path):
    before = hash_content(llama)
    out = rescale(str(llama), str(tmp_path / "out"), target_len=TARGET, method="ntk-by-parts")
    assert out == tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "manifest.json",
        "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert (out / "model.safetensors").samefile(llama / "model.safetensors")
    for name in ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (llama / name).read_bytes()
        assert not (out / name).samefile(llama / name)
    assert read(out / "tokenizer_config.json") == {
        **read(llama / "tokenizer_config.json"), "model_max_length": TARGET}
    assert read(out / "generation_config.json") == {"do_sample": False}
    assert AutoTokenizer.from_pretrained(out).model_max_length == TARGET
    assert hash_content(llama) == before, "the source was changed"


def test_config_keeps_everything_else(llama, tmp_path):
    out = rescale(llama, tmp_path / "out", target_len=TARGET)
    ours = {"rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"}
    before, after = read(llama / "config.json"), read(out / "config.json")
    assert {k: v for k, v in after.items() if k not in ours} == {
        k: v for k, v in before.items() if k not in ours}


def test_manifest(llama, tmp_path):
    out = rescale(llama, tmp_path / "out", target_len=TARGET, method="yarn", beta_fast=16)
    record = read(out / MANIFEST_NAME)
    assert record["stage"] == "rescale"
    assert record["inputs"] == {"model": {"path": str(llama), "sha256": hash_content(llama)}}
    assert record["options"] == {"target_len": TARGET, "method": "yarn", "beta_fast": 16,
                                 "sliding_window": "refuse", "from_len": None}
    assert record["results"]["rope_before"] == read_config(llama).rope.to_json()
    assert record["results"]["rope_after"] == read_config(out).rope.to_json()
    assert record["outputs"]["model.safetensors"]["sha256"] == hash_file(
        llama / "model.safetensors")
    assert outputs_intact(out) is None


@pytest.mark.parametrize("method", ANY_BASE)
def test_reading_back_gives_the_same_rope(method, llama, tmp_path):
    out = rescale(llama, tmp_path / "out", target_len=TARGET, method=method,
                  **options_for(method, TINY))
    assert read_config(out).rope.to_json() == read(out / MANIFEST_NAME)["results"]["rope_after"]
    again = rescale(llama, tmp_path / "again", target_len=TARGET, method=method,
                    **options_for(method, TINY))
    assert hash_content(again) == hash_content(out)


def test_native_length_keeps_the_model(llama, tmp_path):
    out = rescale(llama, tmp_path / "out", target_len=NATIVE)
    assert read_config(out).rope == read_config(llama).rope


def test_shards_keep_names_and_bytes(sharded, tmp_path):
    out = rescale(sharded, tmp_path / "out", target_len=TARGET)
    weights = sorted(p.name for p in sharded.glob("model*"))
    assert len(weights) == 3
    assert sorted(p.name for p in out.glob("model*")) == weights
    for name in weights:
        assert (out / name).read_bytes() == (sharded / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(out)


def test_weights_are_copied_where_links_do_not_work(llama, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    out = rescale(llama, tmp_path / "out", target_len=TARGET)
    assert not (out / "model.safetensors").samefile(llama / "model.safetensors")
    assert (out / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()


def test_a_link_of_a_cache_is_followed(damaged, tmp_path):
    blob = tmp_path / "blob"
    (damaged / "model.safetensors").rename(blob)
    (damaged / "model.safetensors").symlink_to(blob)
    out = rescale(damaged, tmp_path / "out", target_len=TARGET)
    assert not (out / "model.safetensors").is_symlink()
    assert (out / "model.safetensors").read_bytes() == blob.read_bytes()


def test_weights_are_never_loaded(llama, tmp_path):
    code = ("import sys; from extend.rope import rescale, METHODS\n"
            f"rescale({str(llama)!r}, {str(tmp_path / 'out')!r}, target_len={TARGET})\n"
            "print([m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("source", ["damaged", "sharded"])
def test_stored_frequencies_are_dropped(source, request, tmp_path):
    directory = request.getfixturevalue(source)
    original = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        original.update(tensors)
    file = sorted(directory.glob("*.safetensors"))[0]
    stale = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(file), stale: torch.ones(8)}, file)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = read(index)
        content["weight_map"][stale] = file.name
        index.write_text(json.dumps(content))
    out = rescale(directory, tmp_path / "out", target_len=TARGET)
    checkpoint = Checkpoint(out)
    assert set(checkpoint.names) == set(original)
    for name, tensor in original.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    AutoModelForCausalLM.from_pretrained(out)


def test_overwrite(llama, tmp_path):
    out = rescale(llama, tmp_path / "out", target_len=TARGET)
    (out / "stale.txt").write_text("old")
    rescale(llama, out, target_len=2 * TARGET, overwrite=True)
    assert read_config(out).max_position_embeddings == 2 * TARGET
    assert not (out / "stale.txt").exists()
    assert os.listdir(tmp_path) == ["out"]
