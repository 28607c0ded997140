"""A plan from a model, from a config, from three numbers; what it writes."""

import json
import math
from pathlib import Path

import pytest

from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.plan import plan, write_plan

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 96, "vocab_size": 96, "max_position_embeddings": 256,
          "rope_theta": 10000.0, "rope_scaling": None,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.fixture
def model(tmp_path: Path):
    def write(**changes: object) -> Path:
        directory = tmp_path / "model"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(CONFIG | changes))
        return directory

    return write


def test_a_model_its_config_and_its_numbers_give_the_same_plan(model):
    directory = model()
    plans = [plan(directory, target_len=2048), plan(directory / "config.json", target_len=2048),
             plan(head_dim=16, rope_theta=10000, from_len=256, target_len=2048)]
    ropes = [json.dumps(found.to_json()["rope"]) for found in plans]
    assert ropes[0] == ropes[1] == ropes[2]
    assert plans[0].to_json()["model"] == str(directory / "config.json")
    assert plans[2].to_json()["model"] is None


def test_a_quantized_model_has_a_rope_too(model):
    directory = model(quantization_config={"quant_method": "gptq"})
    assert plan(directory, target_len=2048).rope.native.original_len == 256


def test_a_window_is_told(model):
    directory = model(model_type="mistral", sliding_window=128)
    assert "sliding window of 128 tokens" in plan(directory, target_len=2048).notes[0]
    assert plan(directory, target_len=2048).to_json()["notes"]


def test_layers_with_a_rope_of_their_own_are_told(model):
    ropes = {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    directory = model(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], head_dim=16,
                      layer_types=["sliding_attention", "full_attention"], sliding_window=64,
                      rope_theta=None, rope_parameters=ropes)
    found = plan(directory, target_len=2048)
    assert found.rope.native.rope_theta == 1e6
    assert "sliding_attention layers keep their own RoPE (theta 10000)" in found.notes


def test_an_extended_model_needs_from(model):
    directory = model(rope_scaling=SCALED, rope_parameters=SCALED, max_position_embeddings=512,
                      original_max_position_embeddings=256)
    with pytest.raises(CompatibilityError, match=r"linear' from 256 to 512 tokens.*--from"):
        plan(directory, target_len=2048)
    found = plan(directory, target_len=2048, from_len=256)
    assert found.rope.native.scaling == {}
    assert found.rope.native.original_len == 256


@pytest.mark.parametrize(("arguments", "error", "match"), [
    ({}, RecipeError, "give a model, or head_dim, rope_theta and from_len together"),
    ({"head_dim": 64}, RecipeError, "they are 64, None and None"),
    ({"head_dim": 7, "rope_theta": 1e4, "from_len": 256}, RecipeError, "even number .* not 7"),
    ({"head_dim": 0, "rope_theta": 1e4, "from_len": 256}, RecipeError, "even number .* not 0"),
    ({"head_dim": 8, "rope_theta": 1.0, "from_len": 256}, RecipeError, "above 1, not 1.0"),
    ({"head_dim": 8, "rope_theta": 1e4, "from_len": 0}, RecipeError, "tokens, not 0"),
    ({"head_dim": 8, "rope_theta": 1e4, "from_len": 4096}, RecipeError, "2048 is below .* 4096"),
    ({"model": "x", "head_dim": 8}, RecipeError, "take the place of a model"),
    ({"model": "/nowhere"}, CheckpointError, "/nowhere/config.json: no such file"),
])
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        plan(target_len=2048, **arguments)


def test_methods_that_a_short_native_length_rules_out_are_listed():
    found = plan(head_dim=8, rope_theta=1e4, from_len=4, target_len=2048).rope
    assert "below one turn" in found.refused["critical"]
    assert "ntk" in found.methods


def test_a_config_with_a_value_of_the_wrong_kind(model):
    with pytest.raises(CheckpointError, match="wrong kind"):
        plan(model(vocab_size="wide"), target_len=2048)


def test_what_is_written(model, tmp_path):
    found = plan(model(), target_len=2048, schedule=[512, 2048])
    out = write_plan(found, tmp_path / "plan")
    assert {p.name for p in out.iterdir()} == {"plan.json", "frequencies.png", "manifest.json"}
    assert json.loads((out / "plan.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert (out / "frequencies.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"config"}
    assert set(manifest["outputs"]) == {"plan.json", "frequencies.png"}
    with pytest.raises(CheckpointError, match="exists already"):
        write_plan(found, out)
    write_plan(found, out, overwrite=True)


@pytest.mark.parametrize("place", [".", ".."])
def test_a_plan_never_replaces_the_model(model, place):
    directory = model()
    with pytest.raises(RecipeError, match="holds the config .*config.json"):
        write_plan(plan(directory, target_len=2048), directory / place, overwrite=True)
    assert [p.name for p in directory.iterdir()] == ["config.json"]
    write_plan(plan(directory, target_len=2048), directory / "plan")
    assert json.loads((directory / "config.json").read_text()) == CONFIG


def test_a_plot_of_pairs_that_stand_still(tmp_path):
    found = plan(head_dim=8, rope_theta=1e4, from_len=64, target_len=256, method="proportional",
                 options={"partial_rotary_factor": 0.5})
    assert found.rope.methods["proportional"].wavelength.tolist()[2:] == [math.inf, math.inf]
    assert (write_plan(found, tmp_path / "out") / "frequencies.png").stat().st_size > 10_000
