"""Known ways in which a checkpoint is read differently: each is found, named, and mended or asked.

Every case says which readers an error concerns, what the message names, and what `--fix` does.
"""

import pytest

from extend.doctor import doctor
from extend.doctor.readers import READERS
from extend.errors import CompatibilityError
from tests.doctor.configs import (
    DYNAMIC,
    LLAMA3,
    LONG,
    LONGROPE,
    SIZES,
    YARN,
    llama,
    load,
    save,
    scaled,
)
from tests.doctor.diagnoses import check_cured, error, lengths_of, theta_of

LENGTH = SIZES["max_position_embeddings"]
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


# --- theta ---

def test_new_keys_only(tmp_path):
    model = save(tmp_path / "model", llama(rope_parameters=PLAIN))
    found = doctor(model)
    assert not found.ok
    problem = error(found, "frequencies")
    assert set(problem.readers) == {"transformers-4.4", "transformers-4", "vllm-old"}
    assert "rope_theta 10000" in problem.message and "500000" in problem.message
    assert "rope_theta" in problem.remedy and "config.json" in problem.remedy
    assert found.changes["config.json: rope_theta"] == "(absent) -> 500000.0"
    cured = check_cured(model, tmp_path / "out")
    assert set(theta_of(cured).values()) == {5e5}


def test_two_thetas_are_asked_for(tmp_path):
    model = save(tmp_path / "model", llama(rope_theta=1e6, rope_parameters=PLAIN))
    found = doctor(model)
    assert theta_of(found)["transformers-4"] == 1e6 and theta_of(found)["vllm"] == 5e5
    assert len(found.questions) == 1 and "--theta" in found.questions[0]
    assert "1000000 (rope_theta)" in found.questions[0]
    assert "500000 (rope_parameters.rope_theta)" in found.questions[0]
    with pytest.raises(CompatibilityError, match="only you can decide.*--theta"):
        doctor(model, fix=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    cured = check_cured(model, tmp_path / "out", theta=5e5)
    assert set(theta_of(cured).values()) == {5e5}


def test_theta_hidden_by_a_scaling(tmp_path):
    """The one theta of the file stands where the readers that see the scaling do not look."""
    model = save(tmp_path / "model", llama(
        rope_scaling=YARN, rope_parameters={"rope_theta": 5e5, **YARN}))
    found = doctor(model)
    assert set(theta_of(found).values()) == {1e4}
    assert {name for f in found.errors for name in f.readers} == set(READERS)
    assert all("10000" in f.message and "500000" in f.message for f in found.errors)
    assert set(theta_of(check_cured(model, tmp_path / "out")).values()) == {5e5}


# --- contradictions ---

def test_scaling_beside_other_parameters(tmp_path):
    model = save(tmp_path / "model", llama(
        rope_theta=5e5, rope_scaling=YARN, rope_parameters={**LLAMA3, "rope_theta": 5e5}))
    question = doctor(model).questions[0]
    assert "rope_scaling is yarn" in question and "rope_parameters is llama3" in question
    for keep, expected in (("rope_scaling", "yarn"), ("rope_parameters", "llama3")):
        check_cured(model, tmp_path / keep, keep=keep)
        assert load(tmp_path / keep)["rope_parameters"]["rope_type"] == expected
        assert load(tmp_path / keep)["rope_scaling"]["rope_type"] == expected


def test_type_against_rope_type(tmp_path):
    model = save(tmp_path / "model", llama(rope_theta=5e5, rope_scaling={**YARN, "type": "linear"}))
    found = doctor(model)
    assert "'yarn'" in found.questions[0] and "'linear'" in found.questions[0]
    assert "--rope-type" in found.questions[0]
    assert "would not load" in error(found, "loading").message
    check_cured(model, tmp_path / "out", rope_type="yarn")
    assert "type" not in load(tmp_path / "out")["rope_scaling"]


def test_old_type_alone_is_renamed(tmp_path):
    entries = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256}
    model = save(tmp_path / "model", llama(rope_theta=5e5, rope_scaling=entries))
    check_cured(model, tmp_path / "out")
    assert load(tmp_path / "out")["rope_scaling"]["rope_type"] == "yarn"


def test_product_of_yarn(tmp_path):
    model = save(tmp_path / "model", scaled(YARN, max_position_embeddings=256))
    found = doctor(model)
    assert lengths_of(found)["vllm-old"] == 4096 and lengths_of(found)["vllm"] == 256
    assert "factor 16 x native length 256 is 4096" in found.questions[0]
    cured = check_cured(model, tmp_path / "out", max_length=4096)
    assert set(lengths_of(cured).values()) == {4096}
    with pytest.raises(CompatibilityError, match="nothing was written"):
        doctor(model, fix=True, max_length=1024)


def test_two_native_lengths(tmp_path):
    config = scaled(LLAMA3)
    config["original_max_position_embeddings"] = 512
    model = save(tmp_path / "model", config)
    question = doctor(model).questions[0]
    assert "512" in question and "256" in question and "--original-length" in question
    check_cured(model, tmp_path / "out", original_length=256)
    assert load(tmp_path / "out")["original_max_position_embeddings"] == 256


def test_native_length_missing_at_the_top(tmp_path):
    config = scaled(LLAMA3)
    del config["original_max_position_embeddings"]
    model = save(tmp_path / "model", config)
    problem = error(doctor(model), "frequencies")
    assert problem.readers == ("llama.cpp",)
    assert "8192" in problem.message and "256" in problem.message
    check_cured(model, tmp_path / "out")


def test_native_length_missing_altogether(tmp_path):
    entries = {"rope_type": "yarn", "factor": 16.0}
    model = save(tmp_path / "model", llama(rope_theta=5e5, rope_scaling=entries))
    assert "--original-length" in doctor(model).questions[0]
    check_cured(model, tmp_path / "out", original_length=256)


# --- attention factor ---

def test_attention_factor_that_sglang_does_not_read(tmp_path):
    model = save(tmp_path / "model", scaled({**YARN, "attention_factor": 1.5}))
    problems = [f for f in doctor(model).errors if f.what == "attention factor"]
    concerned = {name for f in problems for name in f.readers}
    assert concerned == {"vllm-old", "sglang", "llama.cpp"}
    assert any("0.1 ln(factor) + 1" in f.remedy for f in problems)  # llama.cpp's own
    others = [name for name in READERS if name != "llama.cpp"]
    written = doctor(model, fix=True, out=tmp_path / "out", readers=others)
    assert written.ok
    assert {round(r.main.attention_factor, 12) for r in written.readings} == {1.5}


def test_mscale_becomes_an_attention_factor(tmp_path):
    model = save(tmp_path / "model", scaled({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}))
    others = [name for name in READERS if name != "llama.cpp"]
    written = doctor(model, fix=True, out=tmp_path / "out", readers=others)
    assert {r.main.attention_factor for r in written.readings} == {1.0}
    assert "mscale" not in load(tmp_path / "out")["rope_scaling"]


def test_attn_factor_alone_is_asked_for_by_its_effect(tmp_path):
    """transformers does not read the key: what it computes is kept, and the others follow."""
    model = save(tmp_path / "model", scaled({**YARN, "attn_factor": 2.0}))
    problem = error(doctor(model), "attention factor")
    assert set(problem.readers) == {"vllm-old", "sglang"}
    check_cured(model, tmp_path / "out")


# --- rope types that not all engines have ---

def test_dynamic_is_not_alike_anywhere(tmp_path):
    model = save(tmp_path / "model", scaled(DYNAMIC))
    problems = [f for f in doctor(model).errors if f.what == "frequencies"]
    assert {n for f in problems for n in f.readers} == {"vllm-old", "vllm", "sglang", "llama.cpp"}
    assert all("extend rescale --method ntk" in f.remedy for f in problems)
    with pytest.raises(CompatibilityError, match="no form of the configuration"):
        doctor(model, fix=True)


def test_longrope_is_dropped_by_llama_cpp(tmp_path):
    model = save(tmp_path / "model", scaled(LONGROPE))
    found = doctor(model)
    dropped = next(f for f in found.errors if f.readers == ("llama.cpp",))
    assert "longrope not carried over" in dropped.message
    assert "Phi-3 only" in dropped.remedy
    started = next(f for f in found.errors if f.what == "maximum length")
    assert started.readers == ("vllm",) and "256 tokens" in started.message
    attention = next(f for f in found.errors if f.what == "attention factor")
    assert set(attention.readers) == {"vllm-old", "vllm", "sglang"}
    assert "rope_scaling" in attention.remedy  # avoidable, and so is vLLM's length
    check_cured(model, tmp_path / "out", readers=[n for n in READERS if n != "llama.cpp"])


def test_two_lists_of_longrope(tmp_path):
    config = scaled({**LONGROPE, "short_factor": [1.0] * 8})
    found = doctor(save(tmp_path / "model", config))
    problems = {f.readers: f for f in found.findings if f.what == "frequencies"}
    assert set(problems) == {("vllm-old",), ("vllm",), ("llama.cpp",)}
    assert "of short sequences at every length" in problems["vllm",].message
    assert "of long sequences at every length" in problems["vllm-old",].message
    switching = [problems["vllm",], problems["vllm-old",]]
    assert all("same numbers" in f.remedy and not f.avoidable for f in switching)
    assert [f.severity for f in switching] == ["error", "warning"]  # the old one is only told of


def test_llama3_of_qwen_is_dropped_by_llama_cpp(tmp_path):
    config = {**scaled(LLAMA3), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    problem = error(doctor(save(tmp_path / "model", config)), "frequencies")
    assert problem.readers == ("llama.cpp",) and "Llama and Mistral only" in problem.remedy


def test_chunked_attention(tmp_path):
    config = llama(rope_theta=5e5, dual_chunk_attention_config={"chunk_size": 1024})
    found = doctor(save(tmp_path / "model", config))
    problem = error(found, "frequencies")
    assert set(problem.readers) == {"vllm-old", "vllm"} and "chunks of 1024" in problem.message
    assert "dual_chunk_attention_config" in found.questions[0]


def test_old_yarn_is_a_warning_because_nothing_can_be_written(tmp_path):
    found = doctor(save(tmp_path / "model", scaled(YARN)))
    assert found.ok
    warned = next(f for f in found.findings if f.what == "frequencies")
    assert warned.severity == "warning" and warned.readers == ("transformers-4.4",)
    assert f"original_max_position_embeddings {LENGTH}" in warned.message
    assert "4.57 or newer" in warned.remedy


# --- sliding windows ---

@pytest.mark.parametrize(("used", "types"), [
    (False, ["full_attention", "sliding_attention"]), (True, ["full_attention"] * 2)])
def test_contradictory_window_keys(used, types, tmp_path):
    config = {**llama(rope_theta=5e5, sliding_window=512, use_sliding_window=used,
                      max_window_layers=1, layer_types=types), "model_type": "qwen2"}
    problem = error(doctor(save(tmp_path / "model", config)), "sliding window")
    assert "use_sliding_window" in problem.message and "layer_types" in problem.remedy


@pytest.mark.parametrize("changes", [
    {"sliding_window": 512}, {"sliding_window": 512, "use_sliding_window": True},
    {"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}])
def test_window_below_the_length_is_a_warning(changes, tmp_path):
    config = {**llama(rope_theta=5e5, **changes), "model_type": "mistral"}
    found = doctor(save(tmp_path / "model", config))
    assert found.ok
    warned = next(f for f in found.findings if f.what == "sliding window")
    assert warned.severity == "warning" and "512" in warned.message
    assert warned.readers == ("llama.cpp",) and "drop" in warned.remedy


@pytest.mark.parametrize("changes", [
    {"sliding_window": None}, {"sliding_window": 512, "use_sliding_window": False},
    {"sliding_window": LENGTH}, {"sliding_window": 512, "layer_types": ["full_attention"] * 2},
    {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 1}])
def test_windows_that_do_nothing(changes, tmp_path):
    config = {**llama(rope_theta=5e5, **changes), "model_type": "qwen2"}
    assert not [f for f in doctor(save(tmp_path / "m", config)).findings
                if f.what == "sliding window"]


# --- families ---

def test_family_that_is_not_known(tmp_path):
    found = doctor(save(tmp_path / "model", {**scaled(LLAMA3), "model_type": "newmodel"}))
    warned = next(f for f in found.findings if f.what == "model_type")
    assert warned.severity == "warning" and "'newmodel'" in warned.message
    unknown = next(r for r in found.readings if r.reader == "llama.cpp")
    assert "newmodel" in unknown.unknown
    assert "not known: llama.cpp" in found.to_text()


def test_gpt_neox_keeps_its_own_names(tmp_path):
    config = {**llama(rope_parameters={**PLAIN, "partial_rotary_factor": 0.25}),
              "model_type": "gpt_neox"}
    model = save(tmp_path / "model", config)
    assert error(doctor(model), "frequencies").readers == (
        "transformers-4.4", "transformers-4", "vllm-old")
    check_cured(model, tmp_path / "out")
    assert load(tmp_path / "out")["rotary_emb_base"] == 5e5


def test_gemma_3_with_new_keys_only(tmp_path):
    config = {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "rope_parameters": {
        "full_attention": {**PLAIN, "rope_theta": 2e6},
        "sliding_attention": {**PLAIN, "rope_theta": 2e4}}}
    model = save(tmp_path / "model", config)
    found = doctor(model)
    assert error(found, "frequencies of sliding_attention").readers == (
        "transformers-4.4", "transformers-4", "vllm-old")
    assert "10000" in error(found, "frequencies of sliding_attention").message
    check_cured(model, tmp_path / "out")
    written = load(tmp_path / "out")
    assert written["rope_theta"] == 2e6 and written["rope_local_base_freq"] == 2e4


def test_gemma_3_with_two_thetas(tmp_path):
    config = {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "rope_theta": 3e6,
              "rope_local_base_freq": 2e4, "rope_parameters": {
                  "full_attention": {**PLAIN, "rope_theta": 2e6},
                  "sliding_attention": {**PLAIN, "rope_theta": 2e4}}}
    model = save(tmp_path / "model", config)
    assert "3000000 (rope_theta)" in doctor(model).questions[0]
    cured = check_cured(model, tmp_path / "out", theta=2e6)
    assert set(theta_of(cured).values()) == {2e6}
    assert load(tmp_path / "out")["rope_local_base_freq"] == 2e4


def test_phi_3_is_refused_by_transformers_4_with_more_than_three_entries(tmp_path):
    entries = {"rope_type": "longrope", "short_factor": LONG, "long_factor": LONG, "factor": 16.0}
    config = {**llama(rope_theta=5e5, rope_scaling=entries,
                      original_max_position_embeddings=256), "model_type": "phi3"}
    problem = error(doctor(save(tmp_path / "model", config)), "loading")
    assert set(problem.readers) == {"transformers-4.4", "transformers-4", "vllm-old"}
    assert "exactly type, short_factor and long_factor" in problem.message
    # Three entries say it all. vLLM starts at the native length, whatever is written.
    check_cured(tmp_path / "model", tmp_path / "out", readers=[n for n in READERS if n != "vllm"])
    assert set(load(tmp_path / "out")["rope_scaling"]) == {"type", "short_factor", "long_factor"}


def test_phi_3_as_shipped_is_left_loadable(tmp_path):
    """Two lists differ between engines by nature, but a fix must not break those that load it."""
    entries = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": LONG}
    config = {**llama(rope_theta=5e5, rope_scaling=entries,
                      original_max_position_embeddings=256), "model_type": "phi3"}
    found = doctor(save(tmp_path / "model", config))
    assert not [f for f in found.findings if f.what == "loading"]
    assert "config.json: rope_scaling" not in found.changes
