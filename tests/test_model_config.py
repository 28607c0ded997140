"""Every spelling of RoPE keys is read, and all of them are written in agreement."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GlmConfig, LlamaConfig
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import RopeSpec, parse_config, read_config, read_json, write_rope

BASE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 1024}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def parse(**changes):
    return parse_config({**BASE, **changes}, Path("config.json"))


def spec(theta=10000.0, original=1024, **scaling) -> RopeSpec:
    return RopeSpec(rope_theta=theta, rotary_dim=16, original_len=original, scaling=scaling)


def test_sizes():
    config = parse()
    assert (config.architecture, config.hidden_size, config.num_layers, config.num_heads,
            config.num_kv_heads, config.head_dim, config.vocab_size) == (
        "LlamaForCausalLM", 64, 2, 4, 2, 16, 100)
    assert config.tie_word_embeddings is False
    assert parse(head_dim=32).head_dim == 32
    assert parse(num_key_value_heads=None).num_kv_heads == 4
    assert parse(tie_word_embeddings=True).tie_word_embeddings is True


@pytest.mark.parametrize(("keys", "expected"), [
    ({}, spec()),
    ({"rope_theta": 5e5}, spec(5e5)),
    ({"rope_theta": 500000, "rope_scaling": None}, spec(5e5)),
    ({"rotary_emb_base": 5e5}, spec(5e5)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, spec(5e5)),
    ({"rope_parameters": {"rope_theta": 5e5}}, spec(5e5)),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
     spec(5e5)),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
     spec(5e5, rope_type="linear", factor=2.0)),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
     spec(5e5, rope_type="linear", factor=2.0)),
    ({"rope_theta": 5e5, "rope_scaling": YARN}, spec(5e5, 256, **YARN)),
    ({"rope_parameters": {**YARN, "rope_theta": 5e5}}, spec(5e5, 256, **YARN)),
    ({"rope_theta": 5e5, "rope_scaling": YARN, "original_max_position_embeddings": 256},
     spec(5e5, 256, **YARN)),
    ({"rope_theta": 5e5, "original_max_position_embeddings": 256,
      "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
     spec(5e5, 256, rope_type="linear", factor=4.0)),
    ({"rope_scaling": {**YARN, "rope_theta": 5e5},
      "rope_parameters": {**YARN, "rope_theta": 5e5}}, spec(5e5, 256, **YARN)),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 5e5}}, spec(5e5, 256, **YARN)),
])
def test_rope_spellings(keys, expected):
    assert parse(**keys).rope == expected


LONG, SHORT = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [1.0] * 8
PER_PAIR = {"short_factor": SHORT, "long_factor": LONG}


@pytest.mark.parametrize(("keys", "expected"), [
    # Phi-3 128K, under its three names; the factor is the ratio of its lengths
    *(({"rope_scaling": {"type": name, **PER_PAIR}, "original_max_position_embeddings": 256},
       spec(1e4, 256, rope_type="longrope", **PER_PAIR, factor=4.0,
            original_max_position_embeddings=256)) for name in ("su", "longrope", "yarn")),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0, **PER_PAIR}},
     spec(1e4, 1024, rope_type="longrope", factor=2.0, **PER_PAIR,
          original_max_position_embeddings=1024)),
    # dynamic counts from max_position_embeddings, whatever the other key says
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "original_max_position_embeddings": 256},
     spec(1e4, 1024, rope_type="dynamic", factor=2.0)),
    ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 5e5,
                          "partial_rotary_factor": 0.25}},
     spec(5e5, 1024, rope_type="proportional", partial_rotary_factor=0.25)),
    ({"rope_scaling": {"rope_type": "yarn", "factor": None,
                       "original_max_position_embeddings": 256}},
     spec(1e4, 256, rope_type="yarn", factor=4.0, original_max_position_embeddings=256)),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0}, "original_max_position_embeddings": 256},
     spec(1e4, 256, rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
          original_max_position_embeddings=256)),
    # keys that say nothing beside rope_type default, and nulls
    ({"rope_parameters": {"rope_type": "default", "factor": 8.0, "attention_factor": None,
                          "mrope_section": None}}, spec()),
    ({"rope_scaling": {}, "rope_parameters": {}}, spec()),
])
def test_every_type_is_read(keys, expected):
    assert parse(**keys).rope == expected


@pytest.mark.parametrize("keys", [
    {"rotary_pct": 0.5}, {"rope_pct": 0.5}, {"rotary_emb_fraction": 0.5}, {"rotary_dim": 8},
    {"rotary_dim": 8, "partial_rotary_factor": 0.5},
    {"model_type": "glm"}, {"model_type": "glm", "rope_scaling": YARN}])
def test_other_spellings_of_partial_rotary(keys):
    assert parse(**keys).rope.rotary_dim == 8
    written = write_rope({**BASE, **keys}, spec(8e6), 4096)
    assert written["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert parse(**written).rope.rotary_dim == 8


def test_rotary_dim_of_latent_attention():
    raw = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "model_type": "deepseek_v3"}
    assert parse(**raw).rope.rotary_dim == 8
    written = write_rope({**BASE, **raw}, spec(8e6), 4096)
    assert "partial_rotary_factor" not in written["rope_parameters"]


@pytest.mark.parametrize("keys", [
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                         "partial_rotary_factor": 0.5}},
    {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}},
])
@pytest.mark.parametrize("new", [spec(8e6), spec(1e4, 256, **YARN)], ids=["plain", "yarn"])
def test_partial_rotary(keys, new):
    assert parse(**keys).rope.rotary_dim == 8
    written = write_rope({**BASE, **keys}, new, 4096)
    assert written["partial_rotary_factor"] == 0.5
    assert written["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert parse(**written).rope.rotary_dim == 8


def test_partial_rotary_is_what_transformers_reads():
    raw = {**BASE, "model_type": "glm", "head_dim": 16, "partial_rotary_factor": 0.5}
    written = write_rope(raw, spec(8e6), 4096)
    module = GlmRotaryEmbedding(GlmConfig.from_dict(written))
    expected = 8e6 ** -(torch.arange(0, 8, 2).double() / 8)
    # fp32 in transformers, fp64 here
    torch.testing.assert_close(module.inv_freq.double(), expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("rope", [
    spec(5e5), spec(283461213.0, 4096), spec(5e5, 256, rope_type="linear", factor=16.0),
    spec(5e5, 256, **YARN),
    spec(5e5, 256, rope_type="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=4.0,
         original_max_position_embeddings=256),
    spec(5e5, 256, rope_type="longrope", factor=16.0, attention_factor=1.0, **PER_PAIR,
         original_max_position_embeddings=256),
    spec(5e5, 256, rope_type="proportional", partial_rotary_factor=0.25)],
    ids=lambda r: r.rope_type)
def test_written_rope_reads_back(rope):
    raw = {**BASE, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0},
           "seq_length": 1024, "model_max_length": 1024, "rotary_emb_base": 1e4}
    written = json.loads(json.dumps(write_rope(raw, rope, 4096)))
    back = parse(**written)
    plain = rope.rope_type == "default"
    assert back.rope == RopeSpec(**{**rope.to_json(), "original_len": 4096 if plain else 256})
    assert back.max_position_embeddings == 4096
    assert not {"seq_length", "model_max_length", "rotary_emb_base"} & set(written)
    assert (written["rope_scaling"] is None) == plain
    if not plain:
        assert written["rope_scaling"] == written["rope_parameters"]
        assert written["original_max_position_embeddings"] == 256
    assert "partial_rotary_factor" not in written  # proportional's is not a share of channels
    assert written["rope_parameters"]["rope_theta"] == written["rope_theta"] == rope.rope_theta
    assert raw["seq_length"] == 1024, "the argument was changed"
    loaded = LlamaConfig.from_dict(written)
    assert loaded.rope_parameters["rope_theta"] == rope.rope_theta
    assert loaded.rope_parameters["rope_type"] == rope.rope_type


def test_plain_rope_leaves_no_trace_of_an_older_scaling():
    scaled = write_rope(BASE, spec(5e5, 256, **YARN), 1024)
    written = write_rope(scaled, spec(8e6), 4096)
    assert "original_max_position_embeddings" not in written
    assert parse(**written).rope == spec(8e6, 4096)


def test_spec_survives_json():
    rope = spec(5e5, 256, **YARN)
    assert RopeSpec.from_json(json.loads(json.dumps(rope.to_json()))) == rope


@pytest.mark.parametrize(("keys", "expected"), [
    ({}, None),
    ({"sliding_window": 64}, 64),
    ({"sliding_window": None, "use_sliding_window": True}, None),
    ({"sliding_window": 64, "use_sliding_window": False}, None),
    ({"sliding_window": 64, "use_sliding_window": True}, 64),
    ({"sliding_window": 64, "layer_types": ["full_attention"] * 2}, None),
    ({"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, 64),
])
def test_sliding_window(keys, expected):
    assert parse(**keys).sliding_window == expected


@pytest.mark.parametrize(("keys", "message"), [
    ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
     "rope_theta is 1000000.0 at the top but 10000.0 in rope_parameters"),
    ({"original_max_position_embeddings": 512, "rope_scaling": YARN},
     "original_max_position_embeddings is 512 at the top but 256"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6},
                          "sliding_attention": {"rope_theta": 1e4}}},
     "model_type 'llama' is not supported like this: .* no layer_types"),
    ({"rope_theta": 1e6, "rotary_emb_base": 5e5},
     r"rope_theta is 1000000.0 at the top but 500000.0 at the top \(rotary_emb_base\)"),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
     "rope_type is default in rope_parameters but yarn in rope_scaling"),
    ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8.0}},
     "factor is 8.0 in rope_parameters but 4.0 in rope_scaling"),
    ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 4.0}},
     r"rope_type is yarn in rope_scaling but linear in rope_scaling \(type\)"),
    ({"partial_rotary_factor": 0.5, "rotary_pct": 0.25},
     r"partial_rotary_factor is 0.5 at the top but 0.25 at the top \(rotary_pct\)"),
    ({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
     "partial_rotary_factor is 0.5 at the top but 0.25 in rope_parameters"),
    ({"rotary_dim": 4, "partial_rotary_factor": 0.5}, r"0.5 at the top but 0.25 at the top \(rot"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; it must be above 0 and at m"),
    ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be a finite number above 1"),
    ({"rope_theta": float("inf")}, "rope_theta is inf; it must be a finite number above 1"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5 in its RoPE entries"),
    ({"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
     "short_factor has 1 entries but the model has 8 rotated pairs"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
     "rope_type 'mrope' is not supported; known are default, linear, dynamic, yarn"),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
     "mrope_section in rope_parameters is not known for rope_type default"),
    ({"model_type": "gpt_oss"}, "RoPE of the family is scaled, but there is no rope_parameters"),
    ({"hidden_size": None}, "key 'hidden_size' is missing"),
    ({"max_position_embeddings": None}, "key 'max_position_embeddings' is missing"),
])
def test_models_that_are_refused(keys, message):
    with pytest.raises(CompatibilityError, match=message):
        parse(**keys)


@pytest.mark.parametrize(("raw", "rope", "max_len", "message"), [
    ({}, spec(rope_type="dynamic", factor=2.0), 4096,
     "counts from max_position_embeddings, which is 1024 and would become 4096"),
    ({"partial_rotary_factor": 0.5}, spec(rope_type="proportional", partial_rotary_factor=0.25),
     4096, r"rotates 0.5 of each head, but rope_type proportional chooses its pairs \(0.25 of"),
    ({"model_type": "phi3"}, spec(1e4, 256, **YARN), 1024,
     "loads model_type 'phi3' with plain RoPE or longrope only, not with yarn"),
])
def test_what_is_not_written(raw, rope, max_len, message):
    with pytest.raises(CompatibilityError, match=message):
        write_rope({**BASE, **raw}, rope, max_len)


@pytest.mark.parametrize(("scaling", "native", "three"), [
    ({"factor": 1.0, "attention_factor": 1.0}, 4096, True),
    ({"factor": 16.0}, 256, True),
    ({"factor": 16.0, "attention_factor": 1.0}, 256, False)])  # which those three cannot say
def test_the_three_entries_of_phi3(scaling, native, three):
    """Its class in transformers 4 refuses a rope_scaling of any other number of entries."""
    rope = spec(1e4, native, rope_type="longrope", **scaling, **PER_PAIR,
                original_max_position_embeddings=native)
    written = write_rope({**BASE, "model_type": "phi3"}, rope, 4096)
    assert (written["rope_scaling"] == {"type": "longrope", **PER_PAIR}) == three
    assert parse(**written).rope == rope


def test_dynamic_is_kept_where_nothing_changes():
    raw = {**BASE, "rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    written = write_rope(raw, parse(**raw).rope, 1024)
    assert parse(**written).rope == parse(**raw).rope
    assert written["rope_scaling"] == {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(("text", "error", "message"), [
    (None, CheckpointError, "no such file"),
    ("{", CheckpointError, "not valid JSON"),
    ("[1]", CheckpointError, "holds a JSON list, not an object"),
    ("[" * 100_000, CheckpointError, "not valid JSON"),
    (b"\xff\xfe{}", CheckpointError, "not valid JSON"),
    (json.dumps({**BASE, "num_attention_heads": "four"}), CheckpointError,
     "num_attention_heads is 'four'; it must be a whole number from 1"),
    (json.dumps({**BASE, "max_position_embeddings": 0}), CheckpointError,
     "max_position_embeddings is 0; it must be a whole number from 1"),
    (json.dumps({**BASE, "max_position_embeddings": -5}), CheckpointError,
     "max_position_embeddings is -5"),
    (json.dumps({**BASE, "max_position_embeddings": float("inf")}), CheckpointError,
     "max_position_embeddings is inf"),
    (json.dumps({**BASE, "num_hidden_layers": True}), CheckpointError, "num_hidden_layers is True"),
    (json.dumps({**BASE, "sliding_window": "all"}), CheckpointError,
     "sliding_window is 'all'; it must be a whole number from 0"),
    (json.dumps({**BASE, "rope_scaling": "linear"}), CheckpointError, "of the wrong kind"),
    (json.dumps({**BASE, "num_attention_heads": 0}), CheckpointError, "num_attention_heads is 0"),
    (json.dumps({**BASE, "vocab_size": "many"}), CheckpointError, "of the wrong kind"),
    (json.dumps({**BASE, "quantization_config": {"quant_method": "awq"}}), CompatibilityError,
     r"quantized \(awq\); dequantize"),
])
def test_files_that_are_refused(text, error, message, tmp_path):
    if isinstance(text, str):
        (tmp_path / "config.json").write_text(text)
    elif text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(error, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_read_json_of_a_directory(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)
