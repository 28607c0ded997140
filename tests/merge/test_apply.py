"""Merging against the tuned model, against PEFT, and against sums in fp64."""

import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from extend.adapter_format.peft_files import Adapter, TensorFile
from extend.checkpoint import Checkpoint, write
from extend.errors import CheckpointError, RecipeError
from extend.merge import merge, total
from tests.adapter_format.tiny_models import LONG, LONG_THETA, NATIVE, edit_json, write_tokenizer

# Distance of neighbouring numbers, relative: one unit in the last place is at most this times |x|.
ULP = {torch.float32: 2.0 ** -23, torch.bfloat16: 2.0 ** -7, torch.float16: 2.0 ** -10}
TOKENS = torch.arange(2, 50)[None] % 96


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = Checkpoint(directory)
    return {name: files.read(name) for name in files.names}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def modules_of(adapter: Path) -> dict[str, torch.Tensor]:
    """Weight name -> B @ A in fp64, straight from the file."""
    factors = load_file(adapter / "adapter_model.safetensors")
    products = {}
    for key in factors:
        if key.endswith("lora_A.weight"):
            other = factors[key.replace("lora_A", "lora_B")].double()
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            products[name] = other @ factors[key].double()
    return products


def assert_within_roundings(actual, expected, *, count: float, extra: float = 0.0) -> None:
    """|actual - expected| <= count units in the last place of expected, plus `extra`."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=count * ULP[actual.dtype],
                               atol=extra)


def test_full_rank_gives_the_tuned_model_back(case, tmp_path):
    """fp32 noise of W + B A is about 1e-7 here. In bf16 the tuned value lies on the grid, so that
    noise is rounded away; only where it is as large as a step of the grid, at values near zero,
    may the result differ."""
    out = merge(case.full, case.models.base, tmp_path / "out")
    merged, tuned = weights(out), weights(case.models.tuned)
    assert set(merged) == set(tuned)
    linear = {f"{name}" for name in modules_of(case.full)}
    for name, expected in tuned.items():
        assert_within_roundings(merged[name], expected, count=1, extra=1e-6)
        if case.dtype == torch.bfloat16:
            visible = expected.float().abs() > 1e-4
            assert torch.equal(merged[name][visible], expected[visible])
            if name not in linear:
                assert torch.equal(merged[name], expected)


def test_full_rank_gives_the_tuned_logits(case, tmp_path):
    out = merge(case.full, case.models.base, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tuned = AutoModelForCausalLM.from_pretrained(case.models.tuned, dtype=torch.float32)
    with torch.no_grad():
        # Weights agree to about 1e-7; logits are of size one.
        torch.testing.assert_close(merged(TOKENS).logits, tuned(TOKENS).logits, rtol=0, atol=2e-5)


def test_each_weight_is_the_fp64_sum_rounded_once(case, tmp_path):
    out = merge(case.adapter, case.models.target, tmp_path / "out", weight=0.7)
    merged, target = weights(out), weights(case.models.target)
    products = modules_of(case.adapter)
    side = load_file(case.adapter / "extend_sidecar.safetensors")
    assert not set(products) & set(side)
    for name, weight in target.items():
        delta = products.get(name, side.get(name))
        expected = (weight.double() + 0.7 * delta.double()).to(weight.dtype)
        # fp32 noise of 1e-7 can tip a value over a tie, which costs one step; fp32 itself
        # rounds twice (delta, sum).
        assert_within_roundings(merged[name], expected, count=1, extra=3e-7)
        if case.dtype == torch.bfloat16:
            assert (merged[name] != expected).float().mean() < 1e-3


def peft_merged(adapter: Path, target: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def test_equals_pefts_merge(case, tmp_path):
    out = merge(case.adapter, case.models.target, tmp_path / "out", sidecar=False)
    merged, expected = weights(out), peft_merged(case.adapter, case.models.target, case.dtype)
    products = modules_of(case.adapter)
    assert set(expected) - set(merged) <= {"lm_head.weight"}
    for name, weight in merged.items():
        # One rounding of ours, one of PEFT's, and PEFT may round the delta itself before the sum.
        delta = products.get(name)
        extra = 0.0 if delta is None else float(delta.abs().max()) * ULP[case.dtype]
        assert_within_roundings(weight, expected[name], count=1 if delta is not None else 0,
                                extra=extra)


def test_equals_pefts_merge_in_fp32(case, tmp_path):
    """Whatever the stored dtype, in fp32 both compute the same sum, to its rounding."""
    out = merge(case.adapter, case.models.target, tmp_path / "out", sidecar=False, dtype="float32")
    expected = peft_merged(case.adapter, case.models.target, torch.float32)
    for name, weight in weights(out).items():
        # Two summation orders of eight products of size 0.1.
        torch.testing.assert_close(weight, expected[name], rtol=2.0 ** -22, atol=1e-7)


def test_adapter_in_peft_computes_what_the_merged_model_computes(case, tmp_path):
    out = merge(case.adapter, case.models.target, tmp_path / "out", sidecar=False, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(out)
    config = AutoConfig.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(case.models.target, config=config,
                                                 dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, case.adapter)
    with torch.no_grad():
        # x (W + B A) against x W + (x A) B, in fp32, two layers; logits are of size one.
        torch.testing.assert_close(adapted(TOKENS).logits, merged(TOKENS).logits, rtol=0, atol=2e-5)


def test_config_has_the_long_context_in_every_spelling(case, tmp_path):
    out = merge(case.adapter, case.models.target, tmp_path / "out")
    config, before = read(out / "config.json"), read(case.models.target / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == LONG_THETA
    assert config["max_position_embeddings"] == LONG
    assert config["rope_scaling"] is None
    context = {"rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings"}
    assert {k: v for k, v in config.items() if k not in context} == {
        k: v for k, v in before.items() if k not in context}


def test_side_files_come_from_the_target(case, tmp_path):
    target = case.models.target
    out = merge(case.adapter, target, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "manifest.json"}
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (target / file).read_bytes()
    assert AutoTokenizer.from_pretrained(out).model_max_length == LONG
    assert read(out / "generation_config.json") == {"do_sample": False, "eos_token_id": 2}


def test_merged_model_generates_past_the_old_length(case, tmp_path):
    out = merge(case.adapter, case.models.target, tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.tie_word_embeddings == case.tied
    prompt = torch.arange(NATIVE + 40)[None] % 96
    assert model.generate(prompt, max_new_tokens=2).shape == (1, NATIVE + 42)


def test_tied_embeddings_stay_tied(tied, tmp_path):
    out = merge(tied.full, tied.models.base, tmp_path / "out")
    assert "lm_head.weight" not in weights(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_stored_copy_of_a_tied_head_moves_with_the_embedding(tied, tmp_path):
    import shutil

    target = Path(shutil.copytree(tied.models.target, tmp_path / "target"))
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              target / "model.safetensors", metadata={"format": "pt"})
    merged = weights(merge(tied.adapter, target, tmp_path / "out"))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_weight_zero_leaves_every_bit_and_writes_the_long_rope(case, tmp_path):
    out = merge(case.adapter, case.models.target, tmp_path / "out", weight=0)
    file = "model.safetensors"
    assert {n: t.view(torch.uint8).tolist() for n, t in load_file(out / file).items()} == {
        n: t.view(torch.uint8).tolist() for n, t in load_file(case.models.target / file).items()}
    assert read(out / "config.json")["rope_theta"] == LONG_THETA


def test_sidecar_can_be_left_out(llama, tmp_path):
    out = merge(llama.adapter, llama.models.target, tmp_path / "out", sidecar=False)
    merged, target = weights(out), weights(llama.models.target)
    for name in load_file(llama.adapter / "extend_sidecar.safetensors"):
        assert torch.equal(merged[name], target[name])
    assert read(out / "manifest.json")["results"]["sidecar_left_out"] == 7


@pytest.mark.parametrize(("name", "dtype"), [
    ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)])
def test_dtype_rounds_once_from_fp32(llama, tmp_path, name, dtype):
    wide = weights(merge(llama.adapter, llama.models.target, tmp_path / "wide"))
    out = merge(llama.adapter, llama.models.target, tmp_path / "out", dtype=name)
    for tensor, value in weights(out).items():
        torch.testing.assert_close(value, wide[tensor].to(dtype), rtol=0, atol=0)
    assert AutoConfig.from_pretrained(out).dtype == dtype


def test_blocks_of_rows_change_nothing_but_the_last_bit(llama, tmp_path, monkeypatch):
    whole = weights(merge(llama.adapter, llama.models.target, tmp_path / "whole"))
    monkeypatch.setattr(total, "_BLOCK_BYTES", 4 * 64 * 5)
    for name, value in weights(merge(llama.adapter, llama.models.target, tmp_path / "b")).items():
        torch.testing.assert_close(value, whole[name], rtol=ULP[torch.float32], atol=1e-8)


def test_sharded_target(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama.models.target)
    model.save_pretrained(tmp_path / "target", max_shard_size="40KB")
    write_tokenizer(tmp_path / "target")
    assert len(list((tmp_path / "target").glob("*.safetensors"))) > 2
    merged = weights(merge(llama.adapter, tmp_path / "target", tmp_path / "out"))
    expected = weights(merge(llama.adapter, llama.models.target, tmp_path / "single"))
    assert set(merged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=0)


def test_memory_holds_a_block_of_rows(llama, tmp_path, monkeypatch):
    """The writer asks for a tensor block by block, and no block is larger than it may be."""
    monkeypatch.setattr(total, "_BLOCK_BYTES", 4 * 64 * 5)
    sizes, tensor_bytes = [], write._tensor_bytes

    def record(tensor, info):
        sizes.append(tensor.numel())
        return tensor_bytes(tensor, info)
    monkeypatch.setattr(write, "_tensor_bytes", record)
    out = merge(llama.adapter, llama.models.target, tmp_path / "out")
    assert max(sizes) == 64 * 5
    assert sum(sizes) == sum(t.numel() for t in weights(out).values())


@pytest.mark.parametrize(("dtype", "factor"), [(None, 1), ("bfloat16", 0.5)])
def test_output_is_sharded_like_the_target(llama, tmp_path, dtype, factor):
    model = AutoModelForCausalLM.from_pretrained(llama.models.target)
    model.save_pretrained(tmp_path / "target", max_shard_size="40KB")
    write_tokenizer(tmp_path / "target")
    out = merge(llama.adapter, tmp_path / "target", tmp_path / "out", dtype=dtype)
    index = "model.safetensors.index.json"
    before, after = read(tmp_path / "target" / index), read(out / index)
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == factor * before["metadata"]["total_size"]
    assert {f.name for f in out.glob("*.safetensors")} == set(before["weight_map"].values())
    assert Checkpoint(out).file_of == before["weight_map"]
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def foreign_adapter(target: Path, directory: Path, **options) -> Path:
    """An adapter that PEFT made and saved, with factors of its own."""
    model = AutoModelForCausalLM.from_pretrained(target)
    torch.manual_seed(4)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory


@pytest.mark.parametrize("options", [
    {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
    {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "down_proj"],
     "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp.*": 6},
     "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3, "down_proj": 40}},
    {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "o_proj"]},
], ids=["plain", "rslora", "patterns", "head"])
def test_plain_peft_adapter_with_a_rope_donor(llama, tmp_path, options):
    adapter = foreign_adapter(llama.models.target, tmp_path / "adapter", **options)
    out = merge(adapter, llama.models.target, tmp_path / "out", rope_from=llama.models.tuned)
    expected = peft_merged(adapter, llama.models.target, torch.float32)
    merged = weights(out)
    assert any(not torch.equal(merged[n], t) for n, t in weights(llama.models.target).items())
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], rtol=2.0 ** -22, atol=1e-7)
    config = read(out / "config.json")
    assert (config["rope_theta"], config["max_position_embeddings"]) == (LONG_THETA, LONG)


def test_window_keys_are_those_of_the_long_model(llama, target, adapter, tmp_path):
    edit_json(target / "config.json", sliding_window=64, use_sliding_window=True,
              layer_types=["sliding_attention"] * 2)
    sidecar = read(adapter / "extend_sidecar.json")
    sidecar["rope"]["config_keys"]["layer_types"] = ["full_attention"] * 2
    (adapter / "extend_sidecar.json").write_text(json.dumps(sidecar))
    config = read(merge(adapter, target, tmp_path / "out") / "config.json")
    assert config["layer_types"] == ["full_attention"] * 2
    assert "sliding_window" not in config and "use_sliding_window" not in config


def test_derived_buffers_are_dropped_and_recorded(llama, target, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, name: torch.ones(8)}, target / "model.safetensors",
              metadata={"format": "pt"})
    out = merge(llama.adapter, target, tmp_path / "out")
    assert name not in weights(out)
    assert read(out / "manifest.json")["results"]["dropped_buffers"] == [name]


@pytest.mark.parametrize("weight", [math.inf, math.nan, "1"])
def test_weight_must_be_a_finite_number(llama, tmp_path, weight):
    with pytest.raises(RecipeError, match="weight is"):
        merge(llama.adapter, llama.models.target, tmp_path / "out", weight=weight)
    assert not list(tmp_path.iterdir())


def test_overflow_is_refused_and_leaves_nothing(llama, target, tmp_path):
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*infinite"):
        merge(llama.adapter, target, tmp_path / "out" / "m", dtype="float16")
    assert not list((tmp_path / "out").iterdir())


def test_interrupted_merge_leaves_nothing(llama, tmp_path, monkeypatch):
    calls = []
    read_factors = Adapter.read_factors

    def interrupted(self, module):
        calls.append(module)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read_factors(self, module)
    monkeypatch.setattr(Adapter, "read_factors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(llama.adapter, llama.models.target, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_existing_output_is_kept_unless_told(llama, tmp_path):
    out = merge(llama.adapter, llama.models.target, tmp_path / "out")
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        merge(llama.adapter, llama.models.target, out, weight=0.5)
    assert (out / "manifest.json").read_bytes() == before
    merge(llama.adapter, llama.models.target, out, weight=0.5, overwrite=True)
    assert read(out / "manifest.json")["options"]["weight"] == 0.5


def test_same_call_gives_the_same_weights(llama, tmp_path):
    first = merge(llama.adapter, llama.models.target, tmp_path / "a")
    again = merge(llama.adapter, llama.models.target, tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (first / file).read_bytes() == (again / file).read_bytes()


def test_reads_one_tensor_at_a_time(llama, tmp_path, monkeypatch):
    """Alive at once: one pair of factors or one sidecar delta; the target is read by rows."""
    alive: list[weakref.ref] = []
    most = SimpleNamespace(count=0)

    def count(read_tensor):
        def counting(self, name):
            tensor = read_tensor(self, name)
            alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
            most.count = max(most.count, len(alive))
            return tensor
        return counting
    monkeypatch.setattr(Checkpoint, "read", count(Checkpoint.read))
    monkeypatch.setattr(TensorFile, "read", count(TensorFile.read))
    merge(llama.adapter, llama.models.target, tmp_path / "out")
    assert most.count == 2


def test_inputs_are_not_changed(llama, tmp_path):
    before = {f: f.read_bytes() for d in (llama.adapter, llama.models.target) for f in d.iterdir()}
    merge(llama.adapter, llama.models.target, tmp_path / "out")
    assert {f: f.read_bytes() for f in before} == before


def test_manifest(llama, tmp_path):
    out = merge(llama.adapter, llama.models.target, tmp_path / "out")
    manifest = read(out / "manifest.json")
    assert manifest["stage"] == "merge"
    assert manifest["options"] == {
        "weight": 1.0, "method": "add", "options": {}, "layer_weights": None, "sidecar": True,
        "dtype": None}
    assert set(manifest["inputs"]) == {"adapter", "target"}
    results = manifest["results"]
    assert (results["modules"], results["sidecar_tensors"]) == (14, 7)
    assert results["sidecar_left_out"] == 0
    assert results["max_position_embeddings"] == LONG
