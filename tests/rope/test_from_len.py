"""A model that is extended already: told from what to what, or started again from `from_len`."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from extend.errors import CompatibilityError, RecipeError
from extend.manifest import MANIFEST_NAME
from extend.model_config import RopeSpec, read_config, write_rope
from extend.rope import rescale
from extend.rope.rescaling import starting_rope
from tests.rope.conftest import NATIVE, edit_config
from tests.rope.specs import TINY, call

PLAIN = RopeSpec(rope_theta=10_000.0, rotary_dim=16, original_len=NATIVE)
TARGET = 16 * NATIVE


def extend(model: Path, method: str, length: int = 4 * NATIVE, **options) -> None:
    """Give the config of `model` a RoPE as a rescaling writes it."""
    path = model / "config.json"
    spec = call(method, PLAIN, length, **options)
    path.write_text(json.dumps(write_rope(json.loads(path.read_text()), spec, length)))


@pytest.mark.parametrize(("method", "told"), [
    ("yarn", "rope_type 'yarn' from 256 to 1024 tokens"),
    ("ntk-by-parts", "rope_type 'llama3' from 256 to 1024 tokens"),
    ("linear", "rope_type 'linear' from 256 to 1024 tokens"),
    ("proportional", "rope_type 'proportional' from 256 to 1024 tokens"),
    ("longrope", "rope_type 'longrope' for 1024 tokens")])
def test_an_extended_model_is_told_and_started_again(method, told, damaged, tmp_path):
    extend(damaged, method)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CompatibilityError, match=f"is extended already: {told}.*--from") as caught:
        rescale(damaged, tmp_path / "out", target_len=TARGET)
    assert "config.json" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
    out = rescale(damaged, tmp_path / "out", target_len=TARGET, method="yarn", from_len=NATIVE)
    assert read_config(out).rope == call("yarn", PLAIN, TARGET)
    record = json.loads((out / MANIFEST_NAME).read_text())
    assert record["options"]["from_len"] == NATIVE
    assert record["results"]["rope_before"]["scaling"]["rope_type"] in told


@pytest.mark.parametrize(("keys", "told"), [
    ({"rope_scaling": {"type": "linear", "factor": 4.0}},
     "rope_type 'linear' by a factor of 4 with 256 tokens"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}},
     "rope_type 'dynamic' by a factor of 2 with 256 tokens"),
    # the length was left alone, as some model cards have it
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
     "rope_type 'yarn' from 256 to 1024 tokens")])
def test_configs_that_others_extended(keys, told, damaged, tmp_path):
    edit_config(damaged, rope_parameters=None, **keys)
    with pytest.raises(CompatibilityError, match=f"is extended already: {told}"):
        rescale(damaged, tmp_path / "out", target_len=TARGET)
    assert starting_rope(read_config(damaged), 128) == replace(PLAIN, original_len=128)


def test_a_plain_model_of_another_native_length(damaged, tmp_path, caplog):
    """A config may name a length that the model was never trained on."""
    edit_config(damaged, max_position_embeddings=1234)
    out = rescale(damaged, tmp_path / "out", target_len=TARGET, method="critical", from_len=NATIVE)
    assert read_config(out).rope == call("critical", PLAIN, TARGET)
    assert "theta 10000 is taken for that of 256 native tokens, though the config says 1234" in (
        caplog.text)


def test_theta_that_grew_is_kept(damaged):
    """Plain RoPE goes on from where it is; nothing in the file says that it was another."""
    extend(damaged, "critical")
    now = read_config(damaged).rope
    assert starting_rope(read_config(damaged)) == now == call("critical", PLAIN, 4 * NATIVE)


@pytest.mark.parametrize(("keys", "from_len", "error", "message"), [
    ({}, 0, RecipeError, "from_len must be a number of tokens, not 0"),
    ({}, True, RecipeError, "from_len must be a number of tokens, not True"),
    ({}, "256", RecipeError, "from_len must be a number of tokens, not '256'"),
    ({}, 2 * TARGET, RecipeError, "target length 4096 is below the model's native length 8192"),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 128,
     CompatibilityError, "from_len is 128, but the RoPE there was extended from 64 tokens; give"),
    ({"rope_type": "proportional", "partial_rotary_factor": 0.5}, NATIVE, CompatibilityError,
     "rope_type proportional in rope_parameters is no extension but part of the model"),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
      "llama_4_scaling_beta": 0.1}, NATIVE, CompatibilityError,
     "llama_4_scaling_beta in rope_parameters is no extension but part of the model")])
def test_bad_starts(keys, from_len, error, message, damaged, tmp_path):
    if keys:
        edit_config(damaged, rope_scaling=None, rope_parameters={"rope_theta": 10000.0, **keys})
    with pytest.raises(error, match=message):
        rescale(damaged, tmp_path / "out", target_len=TARGET, from_len=from_len)
    assert os.listdir(tmp_path) == ["inputs"]


def test_resonance_and_refusals_of_the_stage(damaged, tmp_path):
    out = rescale(damaged, tmp_path / "out", target_len=TARGET, method="yarn", resonance=True)
    assert read_config(out).rope == call("yarn", TINY, TARGET, resonance=True)
    assert json.loads((out / MANIFEST_NAME).read_text())["options"]["resonance"] is True
    for method, message in (("dynamic", "is read but not written"),
                            ("prolong", "prolong was published for models of theta 500000")):
        with pytest.raises((RecipeError, CompatibilityError), match=message):
            rescale(damaged, tmp_path / "other", target_len=TARGET, method=method)
    assert sorted(os.listdir(tmp_path)) == ["inputs", "out"]
