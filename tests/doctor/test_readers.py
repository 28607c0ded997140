"""Each engine's rules on small configs: what it uses, written out by hand from its source."""


import numpy as np
import pytest

from extend.doctor.families import FAMILIES
from extend.doctor.reading import FULL
from extend.model_config.families import LLAMA_CPP
from tests.doctor.closed_forms import (
    ALL,
    LENGTH,
    MSCALE,
    SU,
    V4,
    by_turns,
    check,
    fixed_dynamic,
    plain,
    ramp,
    read,
)
from tests.doctor.configs import (
    DYNAMIC,
    HEAD_DIM,
    LINEAR,
    LLAMA3,
    LONG,
    LONGROPE,
    SIZES,
    YARN,
    llama,
    scaled,
)

# --- what they all read alike ---

@pytest.mark.parametrize("reader", ALL)
def test_theta_in_both_spellings(reader):
    config = llama(rope_theta=5e5, rope_scaling=None,
                   rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    check(read(reader, config), plain(), 1.0, LENGTH)


@pytest.mark.parametrize("reader", ALL)
def test_llama3_in_all_spellings(reader):
    check(read(reader, scaled(LLAMA3)), by_turns(256), 1.0, LENGTH)


@pytest.mark.parametrize("reader", [r for r in ALL if r != "transformers-4.4"])
def test_yarn_in_all_spellings(reader):
    check(read(reader, scaled(YARN)), ramp(256), MSCALE, LENGTH)


@pytest.mark.parametrize("reader", ALL)
def test_default_theta_of_a_family(reader):
    config = {**llama(), "model_type": "mixtral", "num_local_experts": 2}
    check(read(reader, config), plain(1e6), 1.0, LENGTH)


# --- where theta is looked for ---

@pytest.mark.parametrize("reader", ALL)
def test_new_keys_only_are_theta_10000_on_transformers_4(reader):
    config = llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    check(read(reader, config), plain(1e4 if reader in V4 else 5e5), 1.0, LENGTH)


@pytest.mark.parametrize("reader", ALL)
def test_scaling_hides_the_theta_in_rope_parameters(reader):
    """transformers 5 takes rope_scaling *or* rope_parameters, and theta from the one it took."""
    config = llama(rope_scaling=LINEAR, rope_parameters={"rope_type": "default",
                                                         "rope_theta": 5e5})
    reading = read(reader, config)
    np.testing.assert_allclose(reading.main.short, plain(1e4) / 16, rtol=1e-12)


def test_gpt_neox_has_other_names():
    config = {**llama(rotary_emb_base=25000, rotary_pct=0.5), "model_type": "gpt_neox"}
    for reader in ALL:
        check(read(reader, config), plain(25000, HEAD_DIM // 2), 1.0, LENGTH)


# --- YaRN ---

def test_old_transformers_count_from_the_new_length():
    check(read("transformers-4.4", scaled(YARN)), ramp(LENGTH), MSCALE, LENGTH)


@pytest.mark.parametrize(("reader", "expected"), [
    ("transformers-4.4", 1.5), ("transformers-4", 1.5), ("transformers-5", 1.5), ("vllm", 1.5),
    ("vllm-old", MSCALE), ("sglang", MSCALE), ("llama.cpp", MSCALE)])
def test_who_reads_attention_factor(reader, expected):
    reading = read(reader, scaled({**YARN, "attention_factor": 1.5}))
    assert reading.main.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("reader", "expected"), [
    ("transformers-4.4", MSCALE), ("transformers-4", MSCALE), ("transformers-5", MSCALE),
    ("vllm", MSCALE), ("llama.cpp", MSCALE), ("vllm-old", 2 * MSCALE), ("sglang", 2 * MSCALE)])
def test_who_multiplies_by_attn_factor(reader, expected):
    reading = read(reader, scaled({**YARN, "attn_factor": 2.0}))
    assert reading.main.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("reader", "expected"), [
    ("transformers-4", 1.0), ("transformers-5", 1.0), ("vllm", 1.0),
    ("transformers-4.4", MSCALE), ("vllm-old", MSCALE), ("sglang", MSCALE),
    ("llama.cpp", MSCALE)])
def test_who_reads_mscale(reader, expected):
    reading = read(reader, scaled({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}))
    assert reading.main.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reader", [r for r in ALL if r != "transformers-4.4"])
def test_who_reads_truncate(reader):
    reading = read(reader, scaled({**YARN, "truncate": False}))
    expected = ramp(256, round_ends=reader == "llama.cpp")
    np.testing.assert_allclose(reading.main.short, expected, rtol=1e-12)
    assert np.abs(ramp(256) / ramp(256, False) - 1).max() > 1e-3  # there is something to see


def test_yarn_length_is_a_product_in_old_vllm_only():
    config = scaled(YARN)
    config["max_position_embeddings"] = 1024
    assert {r: read(r, config).max_len for r in ALL} == {
        **dict.fromkeys(ALL, 1024), "vllm-old": 256 * 16}


def test_yarn_without_a_native_length():
    entries = {"rope_type": "yarn", "factor": 16.0}
    config = llama(rope_theta=5e5, rope_scaling=entries, rope_parameters=entries)
    assert "original_max_position_embeddings" in read("vllm-old", config).refusal
    for reader in set(ALL) - {"vllm-old"}:
        check(read(reader, config), ramp(LENGTH), MSCALE, LENGTH)


# --- the native length ---

def test_llama_cpp_finds_the_native_length_at_the_top_only():
    config = scaled({**LLAMA3})
    del config["original_max_position_embeddings"]
    for reader in ALL:
        expected = by_turns(8192 if reader == "llama.cpp" else 256)
        check(read(reader, config), expected, 1.0, LENGTH)


def test_who_prefers_the_native_length_at_the_top():
    config = scaled(LLAMA3)
    config["original_max_position_embeddings"] = 512
    top = {"transformers-5", "vllm", "sglang", "llama.cpp", "vllm-old"}
    for reader in ALL:
        check(read(reader, config), by_turns(512 if reader in top else 256), 1.0, LENGTH)


@pytest.mark.parametrize("kind", ["qwen2", "granite", "smollm3", "gemma2"])
def test_llama3_of_other_architectures_is_dropped_by_llama_cpp(kind):
    config = {**scaled(LLAMA3), "model_type": kind}
    check(read("llama.cpp", config), plain(), 1.0, LENGTH)
    check(read("vllm", config), by_turns(256), 1.0, LENGTH)


def test_what_gguf_can_hold():
    """The list of tensors of each architecture, in the package that llama.cpp publishes."""
    constants = pytest.importorskip("gguf").constants
    for kind, name in (("llama", "LLAMA"), ("mistral", "LLAMA"), ("mixtral", "LLAMA"),
                       ("phi3", "PHI3")):
        tensors = constants.MODEL_TENSORS[constants.MODEL_ARCH[name]]
        carried = LLAMA_CPP[kind]
        assert "llama3" not in carried or constants.MODEL_TENSOR.ROPE_FREQS in tensors
        assert "longrope" not in carried or constants.MODEL_TENSOR.ROPE_FACTORS_LONG in tensors


def test_which_families_carry_more_than_plain_rope_to_llama_cpp():
    assert set(LLAMA_CPP) == set(FAMILIES)
    assert {k for k, kinds in LLAMA_CPP.items() if "llama3" in kinds} == {
        "llama", "mistral", "mixtral"}
    assert {k for k, kinds in LLAMA_CPP.items() if "longrope" in kinds} == {"phi3"}


# --- dynamic, longrope, chunks, proportional ---

def test_dynamic_is_by_length_here_and_fixed_there():
    config = scaled(DYNAMIC)
    for reader in ("transformers-4.4", "transformers-4", "transformers-5"):
        reading = read(reader, config)
        check(reading, plain(), 1.0, LENGTH)
        np.testing.assert_allclose(reading.main.long, fixed_dynamic(), rtol=1e-12)
    for reader in ("vllm-old", "vllm", "sglang"):
        check(read(reader, config), fixed_dynamic(), 1.0, 4 * LENGTH)
    reading = read("llama.cpp", config)
    check(reading, plain(), 1.0, LENGTH)
    assert reading.main.long == reading.main.short


def test_longrope_with_one_list():
    divided = plain() / np.array(LONG)
    config = scaled(LONGROPE)
    for reader in ("transformers-4.4", "transformers-4", "transformers-5"):
        check(read(reader, config), divided, 1.0, LENGTH)
    # vLLM and SGLang know no attention_factor; vLLM starts at the top-level native length.
    check(read("vllm-old", config), divided, SU, LENGTH)
    check(read("vllm", config), divided, SU, 256)
    check(read("sglang", config), divided, SU, LENGTH)
    check(read("llama.cpp", config), plain(), 1.0, LENGTH)


def test_longrope_with_multipliers_for_vllm_and_sglang():
    config = scaled({**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.0})
    for reader in ("vllm-old", "vllm", "sglang"):
        assert read(reader, config).main.attention_factor == 1.0


def test_longrope_with_two_lists_is_chosen_once_by_vllm():
    short = [1.0] * 8
    config = scaled({**LONGROPE, "short_factor": short})
    reading = read("transformers-5", config)
    np.testing.assert_allclose(reading.main.short, plain(), rtol=1e-12)
    np.testing.assert_allclose(reading.main.long, plain() / np.array(LONG), rtol=1e-12)
    assert read("vllm", config).main.short == read("vllm", config).main.long == (
        reading.main.short)
    del config["original_max_position_embeddings"]  # then it starts at the whole length
    assert read("vllm", config).main.short == read("vllm", config).main.long == reading.main.long


def test_phi_3_keeps_its_factors_in_llama_cpp():
    config = {**llama(rope_theta=5e5, original_max_position_embeddings=256, rope_scaling={
        "type": "longrope", "short_factor": [1.0] * 8, "long_factor": LONG}), "model_type": "phi3"}
    check(read("llama.cpp", config), plain() / np.array(LONG), SU, LENGTH)
    check(read("transformers-4", config), plain(), SU, LENGTH)
    more = {**config, "rope_scaling": {**config["rope_scaling"], "factor": 16.0}}
    assert "exactly" in read("transformers-4", more).refusal


def test_chunked_attention_leaves_the_rope_type_unread():
    config = scaled(YARN, dual_chunk_attention_config={"chunk_size": 1024, "local_size": 128})
    for reader in ("vllm", "vllm-old"):
        reading = read(reader, config)
        np.testing.assert_allclose(reading.main.short, plain(), rtol=1e-12)
        assert "1024" in reading.main.parameters["positions"]
    assert read("sglang", config).unknown
    np.testing.assert_allclose(read("transformers-5", config).main.short, ramp(256), rtol=1e-12)


def test_proportional_is_known_to_transformers_5_alone():
    config = llama(rope_theta=5e5, rope_parameters={
        "rope_type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": 0.5})
    both = {**config, "rope_scaling": config["rope_parameters"]}
    expected = np.concatenate([plain()[:4], np.zeros(4)])
    check(read("transformers-5", both), expected, 1.0, LENGTH)
    for reader in ("transformers-4.4", "transformers-4", "vllm-old", "sglang"):
        assert "proportional" in read(reader, both).refusal
    assert read("vllm", both).unknown


# --- names of the type, and a rotated share ---

def test_type_beside_rope_type():
    config = llama(rope_theta=5e5, rope_scaling={"type": "linear", "rope_type": "llama3",
                                                 **{k: v for k, v in LLAMA3.items()
                                                    if k != "rope_type"}},
                   original_max_position_embeddings=256)
    for reader in ("transformers-4.4", "transformers-4"):  # `type` is copied over `rope_type`
        np.testing.assert_allclose(read(reader, config).main.short, plain() / 16, rtol=1e-12)
    for reader in ("transformers-5", "sglang", "llama.cpp"):
        np.testing.assert_allclose(read(reader, config).main.short, by_turns(256), rtol=1e-12)
    assert "rope_type" in read("vllm", config).refusal
    mistral = {**config, "model_type": "mistral"}
    np.testing.assert_allclose(read("transformers-4", mistral).main.short, by_turns(256),
                               rtol=1e-12)
    assert "rope_type" in read("vllm-old", mistral).refusal


def test_old_name_of_longrope():
    entries = {k: v for k, v in LONGROPE.items() if k != "rope_type"}
    config = llama(rope_theta=5e5, rope_scaling={"type": "su", **entries})
    for reader in ("transformers-4", "transformers-5", "sglang"):
        assert "su" in read(reader, config).refusal
    for reader in ("vllm", "vllm-old"):
        np.testing.assert_allclose(read(reader, config).main.short, plain() / np.array(LONG),
                                   rtol=1e-12)


def test_share_inside_only_is_lost_on_transformers_4():
    entries = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    config = {**llama(rope_theta=5e5, rope_parameters=entries), "model_type": "stablelm"}
    half, quarter = plain(dim=HEAD_DIM // 2), plain(dim=HEAD_DIM // 4)
    for reader in ALL:
        check(read(reader, config), quarter if reader in V4 else half, 1.0, LENGTH)


def test_gemma_3_on_transformers_4_and_5():
    config = {"model_type": "gemma3_text", **SIZES, "head_dim": HEAD_DIM, "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}}
    for reader in ALL:
        thetas = (1e6, 1e4) if reader in V4 else (5e5, 2e4)
        layers = read(reader, config).layers
        for layer, theta in zip((FULL, "sliding_attention"), thetas):
            np.testing.assert_allclose(layers[layer].short, plain(theta), rtol=1e-12)


def test_gemma_3_is_not_multiplied():
    config = {"model_type": "gemma3_text", **SIZES, "head_dim": HEAD_DIM, "rope_theta": 5e5,
              "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    for reader in set(ALL) - {"sglang"}:
        check(read(reader, config), plain() / 8, 1.0, LENGTH)
    assert read("sglang", config).unknown
