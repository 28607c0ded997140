"""A norm's delta inside the linear deltas: the same function, with the base's norms."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from extend.adapter import extract
from extend.adapter.fold import FAMILIES as FEEDS
from extend.adapter.fold import fold_norms
from extend.delta.pair import open_pair
from extend.errors import CompatibilityError
from extend.merge import merge
from tests.adapter.test_families import FAMILIES
from tests.adapter_format import tiny_models
from tests.adapter_format.tiny_models import SIZES, VOCAB, edit_json, move

# Norms of layer 0 that are folded, and those that are not; the final norm never is.
FOLDED = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "qwen2": ("input_layernorm", "post_attention_layernorm"),
    "mistral": ("input_layernorm", "post_attention_layernorm"),
    "qwen3": ("input_layernorm", "post_attention_layernorm"),
    "phi3": ("input_layernorm", "post_attention_layernorm"),
    "gemma3": ("input_layernorm", "pre_feedforward_layernorm"),
    "qwen3_moe": ("input_layernorm",)}
LEFT = {
    "llama": (), "qwen2": (), "mistral": (), "phi3": (),
    "qwen3": ("self_attn.q_norm", "self_attn.k_norm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm",
               "self_attn.k_norm"),
    "qwen3_moe": ("post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """The family, and directories of a base and a tuned model that share no parameter's value."""
    config_class, model_class, changes = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **changes}))
    move(model, seed=1, scale=0.02)
    model.save_pretrained(root / "base")
    move(model, seed=2, scale=0.02)
    model.save_pretrained(root / "tuned")
    for name in ("base", "tuned"):
        tiny_models.write_tokenizer(root / name)
    return request.param, root


@pytest.fixture(scope="module")
def adapter(models):
    _, root = models
    return extract(root / "base", root / "tuned", root / "adapter", rank=64, fold_norms=True)


@torch.no_grad()
def logits(directory) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.arange(24).remainder(VOCAB).reshape(1, 24) * 7 % VOCAB
    return model(tokens).logits


def test_each_norm_is_folded_or_named(models, adapter):
    family, root = models
    sidecar = json.loads((adapter / "extend_sidecar.json").read_text())
    manifest = json.loads((adapter / "manifest.json").read_text())["results"]
    layers = range(SIZES["num_hidden_layers"])
    folded = {f"model.layers.{i}.{norm}.weight" for i in layers for norm in FOLDED[family]}
    left = {f"model.layers.{i}.{norm}.weight" for i in layers for norm in LEFT[family]}
    assert set(sidecar["folded"]) == folded
    assert set(manifest["not_folded"]) == left | {"model.norm.weight"}
    assert not folded & {*sidecar["tensors"], *sidecar["unchanged"]}
    assert left < set(sidecar["tensors"])
    norms = {n for n in load_file(root / "base" / "model.safetensors") if n.endswith("norm.weight")}
    assert folded | left | {"model.norm.weight"} == norms


def test_merged_into_the_base_it_computes_what_the_tuned_model_does(models, adapter, tmp_path):
    """With the base's folded norms, and fp32 rounding of weights of size one, twice."""
    _, root = models
    merged = merge(adapter, root / "base", tmp_path / "merged")
    sidecar = json.loads((adapter / "extend_sidecar.json").read_text())
    base, found = (load_file(path / "model.safetensors") for path in (root / "base", merged))
    for name in sidecar["folded"]:
        torch.testing.assert_close(found[name], base[name], rtol=0, atol=0)
    torch.testing.assert_close(logits(merged), logits(root / "tuned"), rtol=1e-4, atol=1e-4)


def test_the_folded_norms_matter(models, adapter, tmp_path):
    """Left out, the same norms change the logits: the identity above is no accident."""
    _, root = models
    plain = merge(extract(root / "base", root / "tuned", tmp_path / "plain", rank=64),
                  root / "base", tmp_path / "merged")
    weights, base = (load_file(path / "model.safetensors") for path in (plain, root / "base"))
    folded = json.loads((adapter / "extend_sidecar.json").read_text())["folded"]
    save_file({**weights, **{name: base[name] for name in folded}}, plain / "model.safetensors",
              metadata={"format": "pt"})
    assert float((logits(plain) - logits(root / "tuned")).abs().max()) > 1e-2


def test_a_delta_is_the_closed_form(models):
    family, root = models
    pair = open_pair(root / "base", root / "tuned")
    folded = fold_norms(pair).pair.tuned
    base, tuned = (load_file(root / n / "model.safetensors") for n in ("base", "tuned"))
    feeds = FEEDS[json.loads((root / "base" / "config.json").read_text())["model_type"]]
    plus = 1.0 if family == "gemma3" else 0.0
    for norm in FOLDED[family]:
        name = f"model.layers.1.{norm}.weight"
        ratio = (tuned[name].double() + plus) / (base[name].double() + plus)
        for linear in feeds.linears[norm]:
            weight = f"model.layers.1.{linear}.weight"
            want = tuned[weight].double() @ torch.diag(ratio)
            # fp32: one division and one product
            torch.testing.assert_close(folded.read(weight).double(), want, rtol=3e-7, atol=1e-9)
        torch.testing.assert_close(folded.read(name), base[name], rtol=0, atol=0)


def test_a_gain_of_zero_is_not_folded(copies):
    for directory, value in ((copies.base, 0.0), (copies.tuned, 0.5)):
        weights = load_file(directory / "model.safetensors")
        weights["model.layers.0.input_layernorm.weight"][3] = value
        weights["model.layers.1.input_layernorm.weight"][5] = 0.0  # in both: nothing passes
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    folding = fold_norms(open_pair(copies.base, copies.tuned))
    assert folding.left["model.layers.0.input_layernorm.weight"] == (
        "1 of its gains are zero in the base")
    assert "model.layers.1.input_layernorm.weight" in folding.folded
    weight = folding.pair.tuned.read("model.layers.1.self_attn.q_proj.weight")
    assert bool(torch.isfinite(weight).all())


def test_an_unknown_family_is_refused(copies, tmp_path):
    for directory in (copies.base, copies.tuned):
        edit_json(directory / "config.json", model_type="starcoder2")
    with pytest.raises(CompatibilityError, match="starcoder2.*only of llama"):
        extract(copies.base, copies.tuned, tmp_path / "adapter", rank=4, fold_norms=True)
    assert not (tmp_path / "adapter").exists()


def test_unmoved_norms_are_left_as_they_are(copies):
    base, tuned = (load_file(d / "model.safetensors") for d in (copies.base, copies.tuned))
    moved = {n: base[n] if n.endswith("norm.weight") else w for n, w in tuned.items()}
    save_file(moved, copies.tuned / "model.safetensors", metadata={"format": "pt"})
    folding = fold_norms(open_pair(copies.base, copies.tuned))
    assert not folding.folded and not folding.left
    for name in moved:
        torch.testing.assert_close(folding.pair.tuned.read(name), moved[name], rtol=0, atol=0)
