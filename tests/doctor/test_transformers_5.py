"""The reader of transformers 5 against transformers 5 itself: its configs and its modules."""

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from extend.doctor import doctor
from extend.doctor.families import FAMILIES
from extend.doctor.readers import read_with
from extend.doctor.reading import FULL, ModelFiles
from tests.doctor.configs import (
    DYNAMIC,
    LINEAR,
    LLAMA3,
    LONG,
    LONGROPE,
    SIZES,
    YARN,
    llama,
    save,
    scaled,
)
from tests.doctor.diagnoses import check_cured, error

SHORT = [1.0] * 8
CONFIGS = {
    "theta at the top": llama(rope_theta=5e5),
    "theta inside": llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "no theta": llama(),
    "theta in both": llama(rope_theta=1e6, rope_parameters={"rope_type": "default",
                                                            "rope_theta": 5e5}),
    "null scaling": llama(rope_theta=5e5, rope_scaling=None),
    "empty scaling": llama(rope_theta=5e5, rope_scaling={},
                           rope_parameters={"rope_type": "linear", "factor": 2.0}),
    "linear": llama(rope_theta=5e5, rope_scaling=LINEAR),
    "scaling before parameters": llama(rope_scaling=LINEAR,
                                       rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "type": llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "type and rope_type": llama(rope_scaling={"type": "linear", "rope_type": "yarn",
                                              "factor": 16.0}),
    "yarn": llama(rope_theta=5e5, rope_scaling=YARN),
    "yarn, native length at the top": llama(
        rope_scaling=YARN, original_max_position_embeddings=512),
    "yarn, no native length": llama(rope_scaling={"rope_type": "yarn", "factor": 16.0}),
    "yarn, no factor": llama(rope_scaling={**YARN, "factor": None}),
    "yarn, attention factor": llama(rope_scaling={**YARN, "attention_factor": 1.5}),
    "yarn, mscale": llama(rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}),
    "yarn, one mscale": llama(rope_scaling={**YARN, "mscale": 0.7}),
    "yarn, betas": llama(rope_scaling={**YARN, "beta_fast": 4.0, "beta_slow": 0.5}),
    "yarn, truncate": llama(rope_scaling={**YARN, "truncate": False}),
    "llama3": llama(rope_theta=5e5, rope_scaling=LLAMA3),
    "llama3, native length at the top": llama(
        rope_scaling={k: v for k, v in LLAMA3.items() if "original" not in k},
        original_max_position_embeddings=256),
    "longrope": llama(rope_scaling=LONGROPE),
    "longrope, two lists": llama(rope_scaling={**LONGROPE, "short_factor": SHORT}),
    "longrope, no attention factor": llama(
        rope_scaling={k: v for k, v in LONGROPE.items() if k != "attention_factor"}),
    "longrope, no factor": llama(rope_scaling={
        k: v for k, v in LONGROPE.items() if k not in ("attention_factor", "factor")}),
    "dynamic": llama(rope_theta=5e5, rope_scaling=DYNAMIC),
    "proportional": llama(rope_parameters={"rope_type": "proportional", "rope_theta": 5e5,
                                           "partial_rotary_factor": 0.5, "factor": 2.0}),
    "mistral": {**llama(rope_theta=1e6, sliding_window=None), "model_type": "mistral"},
    "mixtral without theta": {**llama(num_local_experts=2), "model_type": "mixtral"},
    "qwen2": {**llama(rope_theta=1e6, rope_scaling=YARN), "model_type": "qwen2"},
    "qwen3, head_dim": {**llama(rope_theta=1e6, head_dim=32), "model_type": "qwen3"},
    "smollm3 without theta": {**llama(pad_token_id=0), "model_type": "smollm3"},
    "phi": {**llama(rope_theta=1e5), "model_type": "phi"},
    "phi, partial": {**llama(rope_theta=1e5, partial_rotary_factor=0.25), "model_type": "phi"},
    "stablelm": {**llama(), "model_type": "stablelm"},
    "stablelm, partial inside": {**llama(rope_parameters={
        "rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5}),
        "model_type": "stablelm"},
    "phi3": {**llama(rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
                     original_max_position_embeddings=256, pad_token_id=0), "model_type": "phi3"},
    "phi3, native length inside only": {**llama(
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG,
                      "original_max_position_embeddings": 256}, pad_token_id=0),
        "model_type": "phi3"},
    "gpt_neox": {**llama(rotary_pct=0.5, rotary_emb_base=25000), "model_type": "gpt_neox"},
}


def build(tmp_path, raw):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(save(tmp_path / "model", raw))
    return AutoModelForCausalLM.from_config(config), config


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_those_of_the_model(name, tmp_path):
    raw = CONFIGS[name]
    model, config = build(tmp_path, raw)
    reading = read_with("transformers-5", ModelFiles(raw, {}, {}))
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    # fp32 powers: exponent and logarithm each round once, times ln(theta) of about 15.
    torch.testing.assert_close(
        torch.tensor(reading.main.short), rotary.inv_freq, rtol=5e-6, atol=0)
    assert reading.main.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert reading.max_len == config.max_position_embeddings


@pytest.mark.parametrize("name", ["longrope, two lists", "dynamic", "phi3"])
def test_frequencies_of_long_sequences(name, tmp_path):
    raw = CONFIGS[name]
    model, _ = build(tmp_path, raw)
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    reading = read_with("transformers-5", ModelFiles(raw, {}, {}))
    length = 4096 * 4 if name == "dynamic" else 4096  # dynamic counts from its own length
    rotary(torch.zeros(1), torch.arange(length)[None])
    torch.testing.assert_close(
        torch.tensor(reading.main.long), rotary.inv_freq, rtol=5e-6, atol=0)
    assert reading.main.long != reading.main.short


GEMMA = {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "sliding_window": 64,
         "num_hidden_layers": 6}
GEMMAS = {
    "as shipped": {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    "scaled as shipped": {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                          "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "other local theta": {**GEMMA, "rope_theta": 2e6, "rope_local_base_freq": 3e4},
    "nothing": GEMMA,
    "nested": {**GEMMA, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6}}},
    "nested without thetas": {**GEMMA, "rope_theta": 5e6, "rope_parameters": {
        "sliding_attention": {"rope_type": "default"}, FULL: {"rope_type": "default"}}},
    "flat beside nothing nested": {**GEMMA, "rope_parameters": {
        "rope_type": "default", "rope_theta": 7e6}},
}


@pytest.mark.parametrize("name", GEMMAS)
def test_both_frequencies_of_gemma_3(name, tmp_path):
    raw = GEMMAS[name]
    try:
        model, _ = build(tmp_path, raw)
    except AttributeError:  # 5.17 fails on flat entries beside nested ones
        assert name.startswith("flat") and transformers.__version__ < "5.23"
        return
    reading = read_with("transformers-5", ModelFiles(raw, {}, {}))
    rotary = model.model.rotary_emb
    for layer in (FULL, "sliding_attention"):
        torch.testing.assert_close(
            torch.tensor(reading.layers[layer].short), getattr(rotary, f"{layer}_inv_freq"),
            rtol=5e-6, atol=0)


REFUSED = {
    "no factor": llama(rope_scaling={"rope_type": "linear"}),
    "llama3 without low_freq_factor": llama(rope_scaling={
        k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}),
    "longrope without long_factor": llama(rope_scaling={
        k: v for k, v in LONGROPE.items() if k != "long_factor"}),
    "unknown type": llama(rope_scaling={"rope_type": "ntk", "factor": 2.0}),
    "su": llama(rope_scaling={"type": "su", "short_factor": LONG, "long_factor": LONG}),
    "phi3 with su": {**llama(rope_scaling={"type": "su", "short_factor": SHORT,
                                           "long_factor": LONG},
                             original_max_position_embeddings=256, pad_token_id=0),
                     "model_type": "phi3"},
    "phi3 with llama3": {**llama(rope_scaling=LLAMA3, pad_token_id=0), "model_type": "phi3"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_refuses_is_refused(name, tmp_path):
    raw = REFUSED[name]
    reading = read_with("transformers-5", ModelFiles(raw, {}, {}))
    assert reading.refusal and not reading.layers
    with pytest.raises((KeyError, ValueError, StrictDataclassError)):
        build(tmp_path, raw)


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_of_each_family(kind, tmp_path):
    """Theta and rotated share of a config that names neither."""
    raw = {**llama(), "model_type": kind, "pad_token_id": 0}
    config = AutoConfig.from_pretrained(save(tmp_path / "model", raw))
    entries = config.rope_parameters.get(FULL, config.rope_parameters)
    used = read_with("transformers-5", ModelFiles(raw, {}, {})).main.parameters
    assert used["rope_theta"] == entries["rope_theta"]
    head_dim = getattr(config, "head_dim", None) or 16
    read = read_with("transformers-5", ModelFiles({**raw, "head_dim": head_dim}, {}, {}))
    share = entries.get("partial_rotary_factor", 1.0)
    assert read.main.parameters["rotary_dim"] == int(head_dim * share)


def test_a_size_of_head_that_is_left_to_the_class(tmp_path):
    """Mixtral's class holds a null then, with which transformers 5.23 multiplies."""
    raw = {**scaled(YARN, num_local_experts=2), "model_type": "mixtral",
           "architectures": ["MixtralForCausalLM"]}
    problem = error(doctor(save(tmp_path / "raw", raw)), "loading")
    assert "transformers-5" in problem.readers and "needs head_dim" in problem.message
    check_cured(tmp_path / "raw", tmp_path / "out")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    assert model.config.head_dim == 16 and model.model.rotary_emb.inv_freq.shape == (8,)
