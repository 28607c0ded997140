"""Every parameter of every family is in the adapter, or in the sidecar, or named as unchanged."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from extend.adapter import extract
from extend.merge import merge
from tests.adapter_format import tiny_models
from tests.adapter_format.tiny_models import SIZES, move

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    **{name: (*classes, {}) for name, classes in tiny_models.FAMILIES.items()},
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 16, **TOKENS}),
    "phi3": (Phi3Config, Phi3ForCausalLM, TOKENS),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
}
# Parameters that show what is special about a family.
SPECIAL = {
    "llama": "mlp.gate_proj.weight", "qwen2": "self_attn.q_proj.bias",
    "mistral": "self_attn.o_proj.weight", "qwen3": "self_attn.q_norm.weight",
    "gemma3": "post_feedforward_layernorm.weight", "phi3": "self_attn.qkv_proj.weight",
    "qwen3_moe": "mlp.experts.3.down_proj.weight"}


@pytest.fixture(scope="module", params=FAMILIES)
def extracted(request, tmp_path_factory):
    """The family's name, the files of base and tuned, and an adapter of full rank."""
    config_class, model_class, changes = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **changes}))
    model.save_pretrained(root / "base")
    move(model, seed=2, scale=0.01)
    model.save_pretrained(root / "tuned")
    out = extract(root / "base", root / "tuned", root / "adapter", rank=64)
    base, tuned = (load_file(root / name / "model.safetensors") for name in ("base", "tuned"))
    return request.param, base, tuned, out


def test_every_parameter_is_accounted_for(extracted):
    family, base, tuned, out = extracted
    factors = load_file(out / "adapter_model.safetensors")
    side = load_file(out / "extend_sidecar.safetensors")
    sidecar = json.loads((out / "extend_sidecar.json").read_text())
    assert f"model.layers.1.{SPECIAL[family]}" in base
    assert not sidecar["left_out"]
    for name in base:
        delta = tuned[name] - base[name]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            found = factors.pop(f"{module}.lora_B.weight") @ factors.pop(f"{module}.lora_A.weight")
            # fp32 products of factors whose singular values are at most about 1
            torch.testing.assert_close(found, delta, rtol=0, atol=2e-6)
        elif name in side:
            torch.testing.assert_close(side.pop(name), delta, rtol=0, atol=0)
        else:
            assert name in sidecar["unchanged"]
            assert not bool(delta.any())
    assert not factors and not side


def test_matrices_of_layers_are_in_the_adapter_and_the_rest_in_the_sidecar(extracted):
    _, base, tuned, out = extracted
    sidecar = json.loads((out / "extend_sidecar.json").read_text())
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    matrices = {name for name in moved if base[name].dim() == 2 and ".layers." in name
                and not name.endswith("mlp.gate.weight")}
    assert {f"{module}.weight" for module in sidecar["modules"]} == matrices
    assert set(sidecar["tensors"]) == moved - matrices
    assert len(matrices) >= 8


def test_merging_it_into_the_base_gives_the_tuned_model(extracted, tmp_path):
    """Also for experts of their own, routers, biases, q and k norms and a fused qkv."""
    family, _, tuned, out = extracted
    base_dir = out.parent / "base"
    tiny_models.write_tokenizer(base_dir)
    merged = load_file(merge(out, base_dir, tmp_path / "merged") / "model.safetensors")
    assert set(merged) == set(tuned)
    for name, weight in tuned.items():
        # As above, plus one rounding of weights of size one.
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=3e-6, msg=f"{family} {name}")
