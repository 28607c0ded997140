"""Subtraction: what belongs together, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.checkpoint import TensorInfo
from extend.delta.pair import (
    delta_blocks,
    frobenius,
    in_layer_order,
    is_experts,
    is_linear,
    is_unchanged,
    open_pair,
    read_delta,
    residual_norm,
)
from extend.errors import CheckpointError, CompatibilityError
from tests.adapter_format.tiny_models import edit_json, make_models


def change_weights(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_every_delta_equals_torchs(qwen2):
    pair = open_pair(qwen2.base, qwen2.tuned)
    base = load_file(qwen2.base / "model.safetensors")
    tuned = load_file(qwen2.tuned / "model.safetensors")
    assert set(pair.infos) == set(base)
    for name in base:
        delta, base_norm = read_delta(pair, name)
        expected = (tuned[name].double() - base[name].double())
        # Differences of bf16 numbers need at most a few bits more than fp32 has.
        torch.testing.assert_close(delta, expected.float(), rtol=1e-7, atol=0)
        assert base_norm == pytest.approx(float(torch.linalg.norm(base[name].double())), rel=1e-6)


def test_read_does_not_change_what_it_reads(llama):
    pair = open_pair(llama.base, llama.tuned)
    name = "model.norm.weight"
    first, _ = read_delta(pair, name)
    again, _ = read_delta(pair, name)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_linear_weights_are_those_of_the_layers(qwen2):
    pair = open_pair(qwen2.base, qwen2.tuned)
    linear = in_layer_order(name for name, info in pair.infos.items() if is_linear(info))
    assert len(linear) == 2 * 7
    assert linear[0] == "model.layers.0.mlp.down_proj.weight"
    assert not [name for name in linear if "norm" in name or "embed" in name or "bias" in name]


def test_layers_sort_by_number():
    names = ["model.norm.weight", "model.layers.10.a.weight", "model.layers.9.a.weight"]
    assert in_layer_order(names) == [names[2], names[1], names[0]]


def test_norms_of_blocks_equal_those_of_the_whole(monkeypatch):
    monkeypatch.setattr("extend.delta.pair._BLOCK_BYTES", 4 * 20 * 3)
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(10, 20, generator=generator)
    lora_a = torch.randn(2, 20, generator=generator)
    lora_b = torch.randn(10, 2, generator=generator)
    gap = delta.double() - lora_b.double() @ lora_a.double()
    assert frobenius(delta) == pytest.approx(float(torch.linalg.norm(delta.double())), rel=1e-12)
    # fp32 subtraction of numbers of size one, relative to a norm of about 20.
    assert residual_norm(delta, lora_a, lora_b) == pytest.approx(float(torch.linalg.norm(gap)),
                                                                 rel=1e-6)


def test_stored_copy_of_a_tied_head_is_no_parameter(qwen2, tmp_path):
    models = make_models(tmp_path, "qwen2", torch.bfloat16, tied=True)
    change_weights(models.tuned, lambda t: {**t, "lm_head.weight":
                                            t["model.embed_tokens.weight"].clone()})
    assert "lm_head.weight" not in open_pair(models.base, models.tuned).infos


def test_tied_head_that_differs_is_refused(tmp_path):
    models = make_models(tmp_path, "qwen2", torch.bfloat16, tied=True)
    change_weights(models.tuned, lambda t: {**t, "lm_head.weight":
                                            t["model.embed_tokens.weight"] + 1})
    with pytest.raises(CompatibilityError, match=r"tie_word_embeddings.*lm_head\.weight differs"):
        open_pair(models.base, models.tuned)


def test_derived_buffers_are_no_parameters(copies):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(copies.base, lambda t: {**t, name: torch.ones(8)})
    assert name not in open_pair(copies.base, copies.tuned).infos


def test_missing_tensor_names_it_and_the_side(copies):
    change_weights(copies.tuned, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    with pytest.raises(CompatibilityError,
                       match=r"model\.norm\.weight: shape \[64\] in base but \(none\) in tuned"):
        open_pair(copies.base, copies.tuned)


def test_extra_tensor_names_it(copies):
    change_weights(copies.tuned, lambda t: {**t, "model.extra.weight": torch.ones(3)})
    with pytest.raises(CompatibilityError,
                       match=r"model\.extra\.weight: shape \(none\) in base but \[3\] in tuned"):
        open_pair(copies.base, copies.tuned)


def test_all_differences_come_in_one_message(llama, tmp_path):
    other = make_models(tmp_path, "llama", torch.float32, vocab_size=100, num_key_value_heads=4)
    with pytest.raises(CompatibilityError) as caught:
        open_pair(llama.base, other.tuned)
    message = str(caught.value)
    assert "num_kv_heads is 2 in base but 4 in tuned" in message
    assert "vocab_size is 96 in base but 100 in tuned" in message
    assert "lm_head.weight: shape [96, 64] in base but [100, 64] in tuned" in message
    assert "k_proj.weight: shape [32, 64] in base but [64, 64] in tuned" in message


def test_long_lists_are_cut(llama, tmp_path):
    other = make_models(tmp_path, "llama", torch.float32, hidden_size=32)
    with pytest.raises(CompatibilityError, match=r"and \d+ tensors more"):
        open_pair(llama.base, other.tuned)


def test_another_architecture_is_refused(llama, qwen2):
    with pytest.raises(CompatibilityError, match=r"architecture is LlamaForCausalLM in base but "
                                                 r"Qwen2ForCausalLM in tuned"):
        open_pair(llama.base, qwen2.tuned)


def test_quantized_model_is_refused(copies):
    edit_json(copies.tuned / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CompatibilityError, match=r"quantized.*gptq"):
        open_pair(copies.base, copies.tuned)


def test_integer_weights_are_refused(copies):
    for directory in (copies.base, copies.tuned):
        change_weights(directory, lambda t: {**t, "model.steps": torch.ones(2, dtype=torch.int8)})
    with pytest.raises(CompatibilityError, match=r"model\.steps is I8"):
        open_pair(copies.base, copies.tuned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(copies, value):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = value
    change_weights(copies.tuned, spoil)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*infinite or NaN"):
        read_delta(open_pair(copies.base, copies.tuned), "model.norm.weight")


@pytest.mark.parametrize(("name", "shape"), [
    ("model.layers.0.conv.weight", (4, 8, 8)), ("model.experts.up_proj", (4, 8, 8)),
    ("model.layers.0.mlp.experts.up_proj", (4, 8, 8, 8))])
def test_other_tensors_of_many_dimensions_are_refused(name, shape):
    with pytest.raises(CompatibilityError, match=rf"{name} .* has {len(shape)} dimensions"):
        is_linear(TensorInfo(name, "F32", shape))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.gate_up_proj",
                                  "model.layers.3.feed_forward.experts.down_proj.weight"])
def test_experts_in_one_tensor_are_no_linear_weight(name):
    info = TensorInfo(name, "F32", (4, 8, 8))
    assert is_experts(info)
    assert not is_linear(info)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.3.up_proj.weight",
                                  "model.layers.0.block_sparse_moe.experts.0.w1.weight"])
def test_experts_of_their_own_are_linear(name):
    assert is_linear(TensorInfo(name, "F32", (8, 8)))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate.weight",
                                  "model.layers.0.block_sparse_moe.gate.weight",
                                  "model.layers.0.mlp.router.weight"])
def test_routers_are_kept_whole(name):
    assert not is_linear(TensorInfo(name, "F32", (4, 8)))


def test_truncated_shard_is_found_before_any_work(copies):
    file = copies.tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_pair(copies.base, copies.tuned)


def test_missing_directory(llama, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_pair(llama.base, tmp_path / "nowhere")


def test_models_without_architecture_key_still_compare(copies):
    for directory in (copies.base, copies.tuned):
        config = json.loads((directory / "config.json").read_text())
        del config["architectures"]
        (directory / "config.json").write_text(json.dumps(config))
    assert open_pair(copies.base, copies.tuned).identity.architecture == "unknown"


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_blocks_make_up_the_delta(qwen2, name, monkeypatch):
    monkeypatch.setattr("extend.delta.pair._BLOCK_BYTES", 4 * 64 * 7)
    pair = open_pair(qwen2.base, qwen2.tuned)
    delta, base_norm = read_delta(pair, name)
    blocks, norms, base_norms = zip(*delta_blocks(pair, name))
    assert len(blocks) > 1 or delta.dim() == 1
    torch.testing.assert_close(torch.cat(blocks), delta, rtol=0, atol=0)
    assert sum(x * x for x in norms) == pytest.approx(frobenius(delta) ** 2, rel=1e-12)
    assert sum(x * x for x in base_norms) == pytest.approx(base_norm ** 2, rel=1e-12)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("place, value, same", [
    (None, 0.0, True), (-1, 2.0, False), (0, 2.0, False), (-1, -0.0, False)])
def test_unchanged_is_bit_for_bit(copies, name, place, value, same, monkeypatch):
    monkeypatch.setattr("extend.delta.pair._BLOCK_BYTES", 4 * 64 * 7)
    whole = load_file(copies.base / "model.safetensors")[name]
    whole.view(-1)[[0, -1]] = 0.0
    other = whole.clone()
    if place is not None:
        other.view(-1)[place] = value
    change_weights(copies.base, lambda tensors: {**tensors, name: whole})
    change_weights(copies.tuned, lambda tensors: {**tensors, name: other})
    assert is_unchanged(open_pair(copies.base, copies.tuned), name) is same


def test_unchanged_at_another_dtype_is_not_the_same_bits(copies):
    name = "model.norm.weight"
    whole = torch.ones_like(load_file(copies.base / "model.safetensors")[name])
    change_weights(copies.base, lambda tensors: {**tensors, name: whole})
    change_weights(copies.tuned, lambda tensors: {**tensors, name: whole.bfloat16()})
    assert not is_unchanged(open_pair(copies.base, copies.tuned), name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_unchanged_must_be_finite(copies, value):
    name = "model.norm.weight"
    whole = load_file(copies.base / "model.safetensors")[name]
    whole[3] = value
    for directory in (copies.base, copies.tuned):
        change_weights(directory, lambda tensors: {**tensors, name: whole})
    with pytest.raises(CheckpointError, match=f"{name} of .* infinite or NaN"):
        is_unchanged(open_pair(copies.base, copies.tuned), name)


@pytest.mark.parametrize("left", [1.0, 0.3, 0.19, 0.16, 1e-3, 1e-5])
def test_residual_norm_is_that_of_the_difference(left):
    """Both ways of taking it: from products, and directly where little is left."""
    generator = torch.Generator().manual_seed(0)
    lora_a, lora_b, rest = (torch.randn(shape, generator=generator)
                            for shape in ((4, 200), (100, 4), (100, 200)))
    delta = lora_b @ lora_a + left * 2 * rest
    expected = torch.linalg.norm(delta.double() - lora_b.double() @ lora_a.double())
    # fp32 elements of size 2, of which the difference may be far smaller.
    assert residual_norm(delta, lora_a, lora_b) == pytest.approx(
        float(expected), rel=2e-6, abs=2e-7 * float(torch.linalg.norm(delta)))


def test_residual_norm_of_a_projection_needs_no_product_with_the_delta():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(60, 90, generator=generator)
    left = torch.linalg.qr(torch.randn(60, 7, generator=generator)).Q
    rows = left.T @ delta
    total, held = (float(x.double().square().sum()) for x in (delta, rows))
    unread = torch.full_like(delta, float("nan"))
    assert residual_norm(unread, rows, left, total=total, cross=held) == pytest.approx(
        residual_norm(delta, rows, left), rel=1e-6)
