"""Broken and hostile files give one clear error and nothing else."""

import pytest
from click.testing import CliRunner

from extend.cli import main
from extend.doctor import doctor
from extend.errors import CheckpointError, CompatibilityError, ExtendError, RecipeError
from tests.doctor.configs import LLAMA3, LONGROPE, YARN, llama, save, scaled


def test_no_such_directory(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        doctor(tmp_path / "none")


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no such directory"):
        doctor(tmp_path / "file")


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        doctor(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json",
                                  "generation_config.json"])
def test_files_that_are_no_json_object(name, text, tmp_path):
    save(tmp_path, llama(rope_theta=5e5))
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        doctor(tmp_path)


NAN, INF = float("nan"), float("inf")
WRONG = [
    ("rope_theta", value) for value in ("5e5", True, [], {}, NAN, INF, -1, 0, 1)] + [
    ("max_position_embeddings", value) for value in
    ("4096", 4096.5, True, 0, -1, NAN, INF, 10**400, [4096])] + [
    ("seq_length", "long"), ("model_max_length", -5), ("sliding_window", "wide"),
    ("original_max_position_embeddings", NAN), ("num_attention_heads", 0),
    ("num_attention_heads", None), ("max_position_embeddings", None), ("head_dim", 1.5),
    ("rope_scaling", [YARN]), ("rope_scaling", "yarn"), ("rope_parameters", 3),
    ("partial_rotary_factor", 2.0), ("partial_rotary_factor", 0), ("layer_types", "full"),
    ("dual_chunk_attention_config", 1), ("rope_theta", 10**400)]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda v: str(v)[:20])
def test_wrong_values_at_the_top(key, value, tmp_path):
    with pytest.raises(CheckpointError, match=key):
        doctor(save(tmp_path, llama(**{"rope_theta": 5e5, key: value})))


INSIDE = [("factor", value) for value in ("4", 0, 0.5, -2, NAN, INF, True, [])] + [
    ("original_max_position_embeddings", 0), ("beta_fast", "fast"), ("attention_factor", NAN),
    ("rope_theta", 0.5), ("rope_type", 3), ("rope_type", []), ("long_factor", "many"),
    ("long_factor", [1.0, NAN]), ("long_factor", [1.0, 0]), ("short_factor", {}),
    ("low_freq_factor", -1), ("mscale", "a")]


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("key", "value"), INSIDE, ids=lambda v: str(v)[:20])
def test_wrong_values_inside(place, key, value, tmp_path):
    config = llama(rope_theta=5e5, **{place: {**YARN, key: value}})
    with pytest.raises(CheckpointError, match=f"{place}.{key}"):
        doctor(save(tmp_path, config))


def test_wrong_values_nested(tmp_path):
    config = llama(layer_types=["full_attention"] * 2, rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": "big"}})
    with pytest.raises(CheckpointError, match=r"rope_parameters\.full_attention\.rope_theta"):
        doctor(save(tmp_path, config))


@pytest.mark.parametrize("value", ["8k", -1, NAN, True, []])
def test_wrong_tokenizer_length(value, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: model_max_length"):
        doctor(save(tmp_path, llama(), tokenizer={"model_max_length": value}))


@pytest.mark.parametrize("value", ["8k", -1, NAN, True])
def test_wrong_generation_length(value, tmp_path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json: max_length"):
        doctor(save(tmp_path, llama(), generation={"max_length": value}))


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}},
    {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
    {"rope_scaling": {**YARN, "factor": 1e308}}, {"rope_theta": 1e308},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 1e200}},
    {"head_dim": 3}, {"head_dim": 2, "partial_rotary_factor": 0.1},
    {"rope_scaling": {**YARN, "original_max_position_embeddings": 1}},
    {"max_position_embeddings": 1}, {"rope_scaling": {"rope_type": "nonsense", "factor": 2.0}},
    {"rope_scaling": {}, "rope_parameters": {}}, {"rope_scaling": {"factor": 2.0}},
    {"model_type": None}, {"model_type": ["llama"]}, {"architectures": None},
    {"architectures": [3]}, {"architectures": "Llama"}, {"layer_types": []},
    {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
    {"layer_types": ["sliding_attention"] * 2, "rope_parameters": {"sliding_attention": {}}},
    {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": None}},
    {"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}],
    ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("fix", [False, True])
def test_strange_but_possible_values_do_not_crash(changes, fix, tmp_path):
    """A report, or one error of ours."""
    model = save(tmp_path / "model", {**llama(rope_theta=5e5), **changes})
    try:
        found = doctor(model, fix=fix, out=tmp_path / "out" if fix else None)
    except ExtendError as error:
        assert str(model) in str(error)
        return
    assert found.to_text() and found.to_json()


@pytest.mark.parametrize(("changes", "named"), [
    ({"text_config": {}}, "text_config"), ({"kv_lora_rank": 512}, "qk_rope_head_dim"),
    ({"qk_rope_head_dim": 64}, "qk_rope_head_dim"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "mrope_section")])
def test_models_with_other_rules_are_refused_by_name(changes, named, tmp_path):
    with pytest.raises(CompatibilityError, match=named):
        doctor(save(tmp_path, llama(**changes)))


def test_truncated_weights(tmp_path):
    save(tmp_path, llama(rope_theta=5e5))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        doctor(tmp_path)


@pytest.mark.parametrize(("option", "value"), [
    ("theta", 1.0), ("theta", NAN), ("theta", "big"), ("max_length", 0), ("max_length", 1.5),
    ("original_length", -1), ("keep", "both"), ("readers", ["vlm"])])
def test_wrong_options(option, value, tmp_path):
    with pytest.raises(RecipeError, match=option):
        doctor(save(tmp_path, llama()), **{option: value})


def test_command_line_says_it_in_one_line(tmp_path):
    result = CliRunner().invoke(main, ["doctor", str(tmp_path / "none")])
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.count("\n") == 1 and "no such directory" in result.stderr


def test_no_weights_is_fine_and_said(tmp_path):
    found = doctor(save(tmp_path, scaled(LLAMA3)))
    assert found.ok
    assert any("no safetensors weights" in f.message for f in found.findings)
