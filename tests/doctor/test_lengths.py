"""Lengths that engines read differently, and lengths that can hardly be meant."""

import pytest

from extend.doctor import doctor
from extend.errors import CompatibilityError
from tests.doctor.configs import LINEAR, SIZES, YARN, llama, load, save, scaled
from tests.doctor.diagnoses import check_cured, error, lengths_of

LENGTH = SIZES["max_position_embeddings"]
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize("entries", [LINEAR, {"rope_type": "linear", "factor": 2.0}])
def test_doubled_length_is_named_with_the_flag_that_prevents_it(entries, tmp_path):
    model = save(tmp_path / "model", scaled(entries))
    problem = error(doctor(model), "maximum length")
    assert set(problem.readers) == {"vllm-old", "vllm", "sglang"}
    assert f"x factor {entries['factor']:g}" in problem.message
    assert str(int(LENGTH * entries["factor"])) in problem.message
    assert f"--max-model-len {LENGTH}" in problem.remedy
    assert f"--context-length {LENGTH}" in problem.remedy
    with pytest.raises(CompatibilityError, match="no form of the configuration"):
        doctor(model, fix=True)
    assert doctor(model, readers=["transformers-4", "transformers-5", "llama.cpp"]).ok


def test_tokenizer_cap(tmp_path):
    model = save(tmp_path / "model", scaled(YARN), tokenizer={"model_max_length": 256, "x": 1})
    problem = error(doctor(model), "maximum length")
    assert problem.readers == ("vllm",)
    assert "tokenizer_config.json model_max_length" in problem.message
    assert "model_max_length in tokenizer_config.json" in problem.remedy
    check_cured(model, tmp_path / "out")
    assert load(tmp_path / "out", "tokenizer_config.json") == {"model_max_length": LENGTH, "x": 1}


@pytest.mark.parametrize("cap", [LENGTH, 8 * LENGTH, 1e30, None])
def test_a_tokenizer_that_takes_more_is_no_problem(cap, tmp_path):
    model = save(tmp_path / "model", scaled(YARN), tokenizer={"model_max_length": cap})
    found = doctor(model)
    assert found.ok and not any("token" in f.what for f in found.findings)


@pytest.mark.parametrize("key", ["seq_length", "max_sequence_length", "model_max_length",
                                 "max_seq_len", "n_positions"])
def test_stale_length(key, tmp_path):
    model = save(tmp_path / "model", llama(rope_theta=5e5, **{key: 512}))
    problem = error(doctor(model), "maximum length")
    assert "vllm" in problem.readers and f"512 tokens ({key})" in problem.message
    assert f"{key} in config.json" in problem.remedy
    check_cured(model, tmp_path / "out")
    assert key not in load(tmp_path / "out")


def test_larger_length_in_another_key_is_asked_for(tmp_path):
    model = save(tmp_path / "model", llama(rope_theta=5e5, seq_length=8 * LENGTH))
    assert "seq_length 32768" in doctor(model).questions[0]
    cured = check_cured(model, tmp_path / "out", max_length=8 * LENGTH)
    assert set(lengths_of(cured).values()) == {8 * LENGTH}


def test_generation_max_length(tmp_path):
    model = save(tmp_path / "model", scaled(YARN), generation={"max_length": 256, "top_p": 0.9})
    problem = error(doctor(model), "generation length")
    assert "stops at 256 tokens" in problem.message
    assert doctor(model, readers=["vllm", "sglang"]).ok
    check_cured(model, tmp_path / "out")
    assert load(tmp_path / "out", "generation_config.json") == {"top_p": 0.9}


@pytest.mark.parametrize("cap", [20, LENGTH, 2 * LENGTH])
def test_generation_lengths_that_do_no_harm(cap, tmp_path):
    """20 is transformers' own default, which it replaces."""
    assert doctor(save(tmp_path / "m", scaled(YARN), generation={"max_length": cap})).ok


# --- max_position_embeddings: 1234 ---

GRADIENT = llama(hidden_size=4096, num_attention_heads=32, rope_theta=45218125210.0,
                 rope_scaling=None, max_position_embeddings=1234)


def test_implausible_length_is_asked_for(tmp_path):
    model = save(tmp_path / "model", GRADIENT)
    found = doctor(model)
    assert set(lengths_of(found).values()) == {1234} and not found.errors  # they do agree
    assert not found.ok and "--max-length" in found.questions[0]
    assert "no multiple of 8" in found.questions[0] and "theta" in found.questions[0]
    assert "No file says the true length" in found.questions[0]
    cured = check_cured(model, tmp_path / "out", max_length=4194304)
    assert set(lengths_of(cured).values()) == {4194304}


@pytest.mark.parametrize(("hint", "text"), [
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"_name_or_path": "org/llama-3-8b-4194k"}, "4194k")])
def test_more_hints(hint, text, tmp_path):
    model = save(tmp_path / "model", {**GRADIENT, **hint})
    assert text in doctor(model).questions[0]


def test_hints_of_the_tokenizer_and_the_directory(tmp_path):
    model = save(tmp_path / "llama-4194k", {**GRADIENT, "rope_theta": 5e5},
                 tokenizer={"model_max_length": 4194304})
    question = doctor(model).questions[0]
    assert "model_max_length is" in question and "4194k" in question


def test_one_weak_hint_is_a_warning(tmp_path):
    model = save(tmp_path / "llama-8b-128k", llama(rope_theta=5e5, rope_parameters=PLAIN))
    found = doctor(model)
    assert found.ok
    assert [f.severity for f in found.findings if f.what == "max_position_embeddings"] == [
        "warning"]


@pytest.mark.parametrize(("name", "says"), [
    ("smollm2-135m-instruct", None), ("pythia-70m", None), ("SmolLM2-360M", None),
    ("TinyStories-1M", None), ("gemma-3-270m-it", None), ("llama-2-7b", None),
    ("stories260K", None),
    ("llama-8b-4k", None), ("yi-1.5m-steps", None), ("Llama-3-8B-Instruct-262k", "262k"),
    ("smollm2-135m-128k", "128k"), ("llama-3-8b-1048k", "1048k"), ("qwen2.5-7b-1m", "1m"),
    ("smollm2-135m-1m", "1m"), ("Qwen2.5-7B-Instruct-1M", "1M"), ("tiny-1M-context", "1M"),
    ("base_32k", "32k"), ("pythia-160m-64k-tokens", "64k"), ("model-100m-ctx", "100m")])
def test_which_numbers_of_a_name_are_lengths(name, says, tmp_path):
    model = save(tmp_path / name, llama(rope_theta=5e5, rope_parameters=PLAIN))
    found = [f.message for f in doctor(model).findings if f.what == "max_position_embeddings"]
    assert found == ([] if says is None else [
        f"max_position_embeddings is {LENGTH}, but the name {name} says {says}"])


@pytest.mark.parametrize(("theta", "length"), [
    (1e4, 4096), (5e5, 8192), (1e6, 32768), (283461213.0, 262144), (3580165449.0, 1048576),
    (1e7, 1010000), (8e6, 65536), (1e6, 131072), (1e5, 2048), (1e6, 32768)])
def test_lengths_of_released_models_are_plausible(theta, length, tmp_path):
    model = save(tmp_path / "model", llama(
        hidden_size=4096, num_attention_heads=32, rope_theta=theta,
        max_position_embeddings=length))
    found = doctor(model)
    assert found.ok and not [f for f in found.findings if f.severity != "note"]
