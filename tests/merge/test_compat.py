"""The gate: each misfit is named with both values, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.merge import merge
from extend.merge.compat import rope_problems
from extend.model_config import RopeSpec
from tests.adapter_format.tiny_models import (
    LONG_THETA,
    NATIVE,
    THETA,
    build,
    edit_json,
    make_models,
    save,
)


def refused(adapter: Path, target: Path, tmp_path: Path, match: str, error=CompatibilityError,
            **options) -> str:
    """The message of a merge that must fail before it writes anything."""
    out = tmp_path / "out" / "merged"
    out.parent.mkdir()
    with pytest.raises(error, match=match) as caught:
        merge(adapter, target, out, **options)
    assert not list(out.parent.iterdir())
    return str(caught.value)


def test_other_architecture(llama, tmp_path):
    target = make_models(tmp_path / "m", "qwen2", torch.float32).target
    message = refused(llama.adapter, target, tmp_path, "does not fit")
    assert ("architecture is LlamaForCausalLM in the adapter's base but Qwen2ForCausalLM in the "
            "target") in message
    assert "tensor model.layers.0.self_attn.k_proj.bias: shape (none) in" in message


@pytest.mark.parametrize(("changes", "text"), [
    ({"num_key_value_heads": 4}, "num_kv_heads is 2 in the adapter's base but 4 in the target"),
    ({"num_hidden_layers": 3}, "num_layers is 2 in the adapter's base but 3 in the target"),
    ({"intermediate_size": 80}, "mlp.up_proj.weight: shape [96, 64] in the adapter's base but "
                                "[80, 64] in the target"),
    ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
     "head_dim is 16 in the adapter's base but 8 in the target")])
def test_other_shape(llama, tmp_path, changes, text):
    target = save(build("llama", **changes), tmp_path / "target", torch.float32)
    assert text in refused(llama.adapter, target, tmp_path, "does not fit")


def test_same_shapes_but_other_heads(llama, target, tmp_path):
    """Eight heads of 8 give the same tensors as four of 16; only the config tells."""
    edit_json(target / "config.json", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    message = refused(llama.adapter, target, tmp_path, "num_heads is 4 in .* but 8 in the target")
    assert "tensor" not in message


def test_tied_target(llama, tmp_path):
    target = save(build("llama", tied=True), tmp_path / "target", torch.float32)
    message = refused(llama.adapter, target, tmp_path, "tied is False in .* but True in the target")
    assert "lm_head.weight: shape [96, 64] in the adapter's base but (none)" in message


def test_other_theta(llama, target, tmp_path):
    edit_json(target / "config.json", rope_parameters={"rope_type": "default",
                                                       "rope_theta": 500000.0})
    refused(llama.adapter, target, tmp_path, "RoPE rope_theta is 10000.0 in .* but 500000.0 in")


def test_target_that_is_long_already(llama, tmp_path):
    out = merge(llama.adapter, llama.models.target, tmp_path / "once")
    refused(llama.adapter, out, tmp_path, rf"rope_theta is {THETA} in .* but {LONG_THETA} in")


def test_scaled_target(llama, target, tmp_path):
    edit_json(target / "config.json", rope_parameters={
        "rope_type": "linear", "factor": 4.0, "rope_theta": THETA})
    message = refused(llama.adapter, target, tmp_path,
                      "RoPE rope_type is default in .* but linear in the target")
    assert "RoPE factor is not set in the adapter's base but 4.0 in the target" in message


def test_length_of_a_plain_rope_does_not_matter(llama, target, tmp_path):
    edit_json(target / "config.json", max_position_embeddings=NATIVE // 2)
    merge(llama.adapter, target, tmp_path / "out")


def rope(**changes) -> RopeSpec:
    return RopeSpec(**{"rope_theta": THETA, "rotary_dim": 16, "original_len": 128,
                       "scaling": {"rope_type": "yarn", "factor": 4.0}, **changes})


@pytest.mark.parametrize(("changes", "line"), [
    ({}, None),
    ({"rope_theta": 2e4}, "rope_theta is 10000.0 in the adapter's base but 20000.0"),
    ({"original_len": 256}, "max_position_embeddings is 128 in the adapter's base but 256"),
    ({"scaling": {"rope_type": "yarn", "factor": 8.0}},
     "factor is 4.0 in the adapter's base but 8"),
    ({"scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}},
     "beta_fast is not set in the adapter's base but 16")])
def test_each_key_of_a_scaled_rope_counts(changes, line):
    problems = rope_problems(rope(), rope(**changes))
    assert [line in problem for problem in problems] == ([True] if line else [])


def test_all_problems_come_in_one_message(llama, tmp_path):
    target = save(build("llama", vocab_size=100, num_key_value_heads=4, rope_parameters={
        "rope_type": "default", "rope_theta": 5e5}), tmp_path / "target", torch.float32)
    message = refused(llama.adapter, target, tmp_path, "does not fit")
    for part in ("num_kv_heads", "k_proj.weight", "rope_theta", str(target),
                 str(llama.adapter)):
        assert part in message


def test_quantized_target(llama, target, tmp_path):
    edit_json(target / "config.json", quantization_config={"quant_method": "awq"})
    refused(llama.adapter, target, tmp_path, "quantized.*awq")


def test_target_of_integers(llama, target, tmp_path):
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros(96, 64, dtype=torch.int8)},
              target / "model.safetensors", metadata={"format": "pt"})
    refused(llama.adapter, target, tmp_path, rf"tensor {name} is I8 in the target")


def test_truncated_target(llama, target, tmp_path):
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(llama.adapter, target, tmp_path, "truncated or damaged", CheckpointError)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "extend_sidecar.safetensors"])
def test_truncated_adapter(llama, adapter, tmp_path, name):
    (adapter / name).write_bytes((adapter / name).read_bytes()[:-7])
    refused(adapter, llama.models.target, tmp_path, rf"{name}.*truncated or damaged",
            CheckpointError)


def test_target_without_weights(llama, target, tmp_path):
    (target / "model.safetensors").unlink()
    refused(llama.adapter, target, tmp_path, "holds no model.safetensors", CheckpointError)


def plain(adapter: Path) -> Path:
    """The adapter as another program would have made it: no sidecar."""
    (adapter / "extend_sidecar.json").unlink()
    return adapter


def test_adapter_without_rope_is_refused(llama, adapter, tmp_path):
    refused(plain(adapter), llama.models.target, tmp_path, r"which RoPE .* --rope-from")


def test_rope_donor_beside_a_sidecar_is_refused(llama, tmp_path):
    refused(llama.adapter, llama.models.target, tmp_path, "has a sidecar", RecipeError,
            rope_from=llama.models.tuned)


def test_rope_donor_of_another_family(llama, tied, adapter, tmp_path):
    refused(plain(adapter), llama.models.target, tmp_path,
            "architecture is Qwen2ForCausalLM in .* but LlamaForCausalLM in",
            rope_from=tied.models.tuned)


def test_plain_adapter_on_a_target_without_its_module(llama, adapter, tmp_path):
    file = plain(adapter) / "adapter_model.safetensors"
    factors = load_file(file)
    save_file({k.replace("layers.1", "layers.7"): v for k, v in factors.items()}, file)
    message = refused(adapter, llama.models.target, tmp_path, "does not fit",
                      rope_from=llama.models.tuned)
    assert "the target holds no model.layers.7.mlp.up_proj.weight" in message
    assert "layers.0" not in message


def test_plain_adapter_of_another_shape(llama, adapter, tmp_path):
    target = save(build("llama", intermediate_size=80), tmp_path / "target", torch.float32)
    refused(plain(adapter), target, tmp_path,
            r"model\.layers\.0\.mlp\.up_proj is adapted at shape \[96, 64\], but the target's is "
            r"\[80, 64\]", rope_from=llama.models.tuned)


def test_plain_adapter_on_a_tied_head(tied, tmp_path):
    adapter = Path(shutil.copytree(tied.adapter, tmp_path / "adapter"))
    file = plain(adapter) / "adapter_model.safetensors"
    extra = {"base_model.model.lm_head.lora_A.weight": torch.ones(8, 64),
             "base_model.model.lm_head.lora_B.weight": torch.ones(96, 8)}
    save_file({**load_file(file), **extra}, file)
    refused(adapter, tied.models.target, tmp_path, "lm_head is adapted, but the target ties",
            rope_from=tied.models.tuned)


def test_files_of_two_extractions(llama, adapter, tmp_path):
    shutil.copyfile(llama.full / "extend_sidecar.json", adapter / "extend_sidecar.json")
    refused(adapter, llama.models.target, tmp_path,
            r"model\.layers\.0\.mlp\.down_proj is 8 in adapter_model\.safetensors but 64 in",
            CheckpointError)


def test_sidecar_file_that_is_gone(llama, adapter, tmp_path):
    (adapter / "extend_sidecar.safetensors").unlink()
    refused(adapter, llama.models.target, tmp_path, "extend_sidecar.safetensors: no such file",
            CheckpointError)


def test_sidecar_of_a_later_schema(llama, adapter, tmp_path):
    edit_json(adapter / "extend_sidecar.json", schema=2)
    refused(adapter, llama.models.target, tmp_path, "schema", CheckpointError)


@pytest.mark.parametrize(("key", "value"), [("modules", []), ("surprise", 1), ("base", {})])
def test_sidecar_that_does_not_follow_its_schema(llama, adapter, tmp_path, key, value):
    edit_json(adapter / "extend_sidecar.json", **{key: value})
    refused(adapter, llama.models.target, tmp_path, rf"extend_sidecar\.json: {key}",
            CheckpointError)


def test_sidecar_whose_rope_is_not_complete(llama, adapter, tmp_path):
    path = adapter / "extend_sidecar.json"
    sidecar = json.loads(path.read_text())
    del sidecar["rope"]["after"]["rope_theta"]
    path.write_text(json.dumps(sidecar))
    refused(adapter, llama.models.target, tmp_path, "rope is not complete", CheckpointError)
