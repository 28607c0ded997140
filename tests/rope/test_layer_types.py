"""Models whose layers differ in RoPE by type: only full attention is rescaled."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MellumConfig, Olmo3Config

from extend.errors import CompatibilityError
from extend.model_config import (
    RopeSpec,
    depends_on_length,
    parse_config,
    read_config,
    write_rope,
)
from extend.rope import rescale
from extend.rope.frequencies import attention_factor, inv_freq
from extend.rope.live import set_rope
from tests.rope.conftest import NATIVE, SIZES, edit_config
from tests.rope.specs import call

TARGET = 4 * NATIVE
FULL, SLIDING = "full_attention", "sliding_attention"
LAYERS = [SLIDING, FULL]
FULL_ROPE = RopeSpec(rope_theta=1e6, rotary_dim=16, original_len=NATIVE)
LOCAL_ROPE = RopeSpec(rope_theta=1e4, rotary_dim=16, original_len=NATIVE)
METHODS = ["theta", "critical", "linear", "ntk-by-parts", "yarn", "longrope"]


def gemma(directory: Path) -> Path:
    """Two layers, the first of which sees 64 tokens."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=64, layer_types=LAYERS,
                              initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return gemma(tmp_path_factory.mktemp("gemma") / "model")


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


def read(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(directory)(torch.arange(200)[None] % 96).logits


# --- reading ---

NESTED = {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e6},
                              SLIDING: {"rope_type": "default", "rope_theta": 1e4}}}
RAW = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 16, **SIZES,
       "sliding_window": 64, "layer_types": LAYERS}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def parse(**keys):
    return parse_config({**RAW, **keys}, Path("config.json"))


@pytest.mark.parametrize("keys", [
    NESTED, {}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    {**NESTED, "rope_theta": 1e6, "rope_local_base_freq": 10000, "rope_scaling": None}],
    ids=["nested", "none", "flat", "both"])
def test_spellings(keys):
    config = parse(**keys)
    assert config.rope == FULL_ROPE
    assert config.rope_by_layer_type == {SLIDING: LOCAL_ROPE}
    assert config.sliding_window == 64


@pytest.mark.parametrize("keys", [
    {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_local_base_freq": 2e4},
    {"rope_parameters": {FULL: {**LINEAR, "rope_theta": 5e5}, SLIDING: {"rope_theta": 2e4}}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8.0},
     "rope_parameters": {FULL: {**LINEAR, "rope_theta": 5e5}, SLIDING: {"rope_theta": 2e4}}},
    {"rope_scaling": {FULL: {**LINEAR, "rope_theta": 5e5}, SLIDING: {"rope_theta": 2e4}}}])
def test_scaled_spellings(keys):
    config = parse(**keys)
    assert config.rope == replace(FULL_ROPE, rope_theta=5e5, scaling=LINEAR)
    assert config.rope_by_layer_type == {SLIDING: replace(LOCAL_ROPE, rope_theta=2e4)}
    found = Gemma3TextConfig.from_dict({**RAW, **keys}).rope_parameters
    if "rope_scaling" not in keys or "factor" in keys["rope_scaling"]:
        assert (found[FULL]["rope_theta"], found[FULL]["factor"]) == (5e5, 8.0)
        assert found[SLIDING]["rope_theta"] == 2e4


@pytest.mark.parametrize(("keys", "message"), [
    ({**NESTED, "rope_theta": 5e5}, "rope_theta is 500000.0 at the top but 1000000.0 in rope_p"),
    ({**NESTED, "rope_local_base_freq": 2e4}, r"rope_theta is 20000.0 at the top "
     r"\(rope_local_base_freq\) but 10000.0 in rope_parameters.sliding_attention"),
    ({**NESTED, "rope_scaling": LINEAR}, "rope_type is default in rope_parameters.full_attention "
     "but linear in rope_scaling"),
    ({"rope_parameters": {"rope_theta": 1e6}}, "'gemma3_text' differs by layer type, but rope_par"),
    ({"rope_parameters": {**NESTED["rope_parameters"], "rope_theta": 1e6}},
     "holds rope_theta beside entries nested by layer type"),
    ({"rope_parameters": {SLIDING: {"rope_theta": 1e4}}}, "none is that of full_attention layers"),
    ({"rope_parameters": {FULL: None, SLIDING: {"rope_theta": 1e4}}}, "none is that of full_atten"),
    ({**NESTED, "rope_scaling": {FULL: LINEAR}}, "are both nested by layer type and differ"),
    ({**NESTED, "per_layer_config": {"1": {"head_dim": 32}}}, "heads or windows differ from layer"),
    ({"model_type": "mellum", "rope_theta": 1e6}, "rope_parameters is not nested by it"),
    ({**NESTED, "model_type": "mellum", "layer_types": None}, "there are no layer_types"),
])
def test_contradictions_and_refusals(keys, message):
    with pytest.raises(CompatibilityError, match=message):
        parse(**keys)


# --- writing ---

@pytest.mark.parametrize("method", METHODS)
def test_only_full_attention_is_rescaled(method, model, tmp_path):
    spec = call(method, FULL_ROPE, TARGET)
    options = {k: v for k, v in (("rope_theta", spec.rope_theta),
                                 ("long_factor", spec.scaling.get("long_factor")))
               if (method, k) in (("theta", "rope_theta"), ("longrope", "long_factor"))}
    out = rescale(model, tmp_path / "out", target_len=TARGET, method=method,
                  sliding_window="keep", **options)
    config = read_config(out)
    assert config.rope == spec
    assert config.rope_by_layer_type[SLIDING].rope_theta == 1e4
    assert config.rope_by_layer_type[SLIDING].scaling == {}
    rotary, before = load(out).model.rotary_emb, load(model).model.rotary_emb
    # fp32 in transformers, fp64 here
    torch.testing.assert_close(rotary.full_attention_inv_freq.double(), inv_freq(spec), rtol=1e-5,
                               atol=0)
    assert rotary.full_attention_attention_scaling == pytest.approx(attention_factor(spec))
    assert torch.equal(rotary.sliding_attention_inv_freq, before.sliding_attention_inv_freq)
    assert rotary.sliding_attention_attention_scaling == 1


@pytest.mark.parametrize("method", METHODS)
def test_transformers_4_reads_the_same(method, model):
    spec = call(method, FULL_ROPE, TARGET)
    written = write_rope(read(model), spec, TARGET)
    # Full attention from rope_theta and rope_scaling, sliding from rope_local_base_freq unscaled.
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (spec.rope_theta, 1e4)
    assert (written["rope_scaling"] or {}) == dict(spec.scaling)
    del written["rope_parameters"]
    assert parse_config(written, Path("config.json")).rope == spec
    found = Gemma3TextConfig.from_dict(written).rope_parameters
    assert {k: v for k, v in found[FULL].items() if k not in ("rope_theta", "rope_type")} == {
        k: v for k, v in spec.scaling.items() if k != "rope_type"}
    assert (found[FULL]["rope_theta"], found[SLIDING]["rope_theta"]) == (spec.rope_theta, 1e4)


def test_windows_are_never_changed_by_accident(model, tmp_path):
    with pytest.raises(CompatibilityError, match="sliding window of 64 tokens, below the target"):
        rescale(model, tmp_path / "out", target_len=TARGET)
    for choice in ("keep", "drop"):
        rescale(model, tmp_path / choice, target_len=NATIVE, sliding_window=choice)
        assert read(tmp_path / choice)["layer_types"] == LAYERS, "a layer's type chooses its RoPE"
    wide = tmp_path / "wide"
    wide.mkdir()
    for file in model.iterdir():
        (wide / file.name).write_bytes(file.read_bytes())
    edit_config(wide, sliding_window=10_000)
    assert read(tmp_path / "drop")["sliding_window"] == NATIVE
    # Same weights, same kernel, same masks: equal but for the order of fp32 sums.
    torch.testing.assert_close(logits(tmp_path / "drop"), logits(wide))
    torch.testing.assert_close(logits(tmp_path / "keep"), logits(model))
    assert (logits(wide) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_set_rope_equals_loading_with_that_rope(method, model, tmp_path):
    spec = call(method, FULL_ROPE, TARGET)
    loaded = load(model)
    set_rope(loaded, read(model), spec, TARGET, torch.device("cpu"))
    out = rescale(model, tmp_path / "out", target_len=TARGET, method="theta", rope_theta=2e6,
                  sliding_window="keep")
    (out / "config.json").write_text(json.dumps(write_rope(read(model), spec, TARGET)))
    fresh = load(out)
    for name, buffer in fresh.model.rotary_emb.named_buffers():
        assert torch.equal(loaded.model.rotary_emb.get_buffer(name), buffer), name
    ids = torch.arange(TARGET)[None] % 96
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, fresh(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(("scaling", "message"), [
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE,
      "truncate": False}, "does not read truncate: false"),
    ({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": NATIVE,
      "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}, "longrope with two lists")])
def test_what_transformers_cannot_do_by_layer_type(scaling, message):
    with pytest.raises(CompatibilityError, match=message):
        write_rope({**RAW, **NESTED}, replace(FULL_ROPE, scaling=scaling), TARGET)


def test_one_layer_type_is_enough_to_depend_on_the_length():
    two_lists = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    plain = {"rope_type": "default"}
    assert depends_on_length({SLIDING: plain, FULL: two_lists})
    assert depends_on_length({SLIDING: {"rope_type": "dynamic"}, FULL: plain})
    assert not depends_on_length({SLIDING: plain, FULL: {**two_lists, "long_factor": [1.0]}})


# --- other families ---

def test_olmo3_has_one_theta_in_transformers_4():
    raw = {**RAW, "model_type": "olmo3", "rope_theta": 5e5, "rope_scaling": None}
    config = parse_config(raw, Path("config.json"))
    base = replace(FULL_ROPE, rope_theta=5e5)
    assert (config.rope, config.rope_by_layer_type) == (base, {SLIDING: base})
    scaled = call("yarn", base, TARGET)
    written = write_rope(raw, scaled, TARGET)
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, dict(scaled.scaling))
    found = Olmo3Config.from_dict(written).rope_parameters
    assert found[FULL]["rope_type"] == "yarn"
    assert found[SLIDING] == {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(CompatibilityError, match="transformers 4 has one theta for sliding and"):
        write_rope(raw, call("critical", base, TARGET), TARGET)


@pytest.mark.parametrize("method", METHODS)
def test_families_that_are_only_nested(method):
    """They have no other spelling, and a null beside the entries would empty them."""
    config = MellumConfig(**SIZES, head_dim=16, layer_types=LAYERS)
    raw = config.to_dict()
    before = parse_config({**raw, "rope_scaling": None}, Path("config.json"))
    spec = call(method, before.rope, TARGET)
    written = write_rope({**raw, "rope_scaling": None}, spec, TARGET)
    assert not {"rope_scaling", "rope_theta", "rope_local_base_freq"} & set(written)
    found = MellumConfig.from_dict(written).rope_parameters
    assert found[FULL] == {"rope_theta": spec.rope_theta, "rope_type": "default", **spec.scaling}
    assert found[SLIDING] == raw["rope_parameters"][SLIDING]
