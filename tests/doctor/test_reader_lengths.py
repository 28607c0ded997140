"""The maximum length that each engine derives."""

import pytest

from tests.doctor.closed_forms import ALL, LENGTH, check, plain, read
from tests.doctor.configs import LINEAR, llama, scaled


@pytest.mark.parametrize(("reader", "expected"), [
    ("transformers-4.4", LENGTH), ("transformers-4", LENGTH), ("transformers-5", LENGTH),
    ("llama.cpp", LENGTH), ("vllm-old", 16 * LENGTH), ("vllm", 16 * LENGTH),
    ("sglang", 16 * LENGTH)])
def test_linear_multiplies_an_extended_length(reader, expected):
    check(read(reader, scaled(LINEAR)), plain() / 16, 1.0, expected)


def test_linear_with_a_native_length_inside_is_not_multiplied_by_sglang():
    config = scaled({**LINEAR, "original_max_position_embeddings": 256})
    assert read("sglang", config).max_len == LENGTH
    assert read("vllm", config).max_len == 16 * LENGTH


def test_a_leftover_factor_multiplies_plain_rope():
    entries = {"rope_type": "default", "rope_theta": 5e5, "factor": 8.0}
    config = llama(rope_theta=5e5, rope_parameters=entries)
    for reader in ("vllm", "sglang"):
        check(read(reader, config), plain(), 1.0, 8 * LENGTH)
    check(read("transformers-5", config), plain(), 1.0, LENGTH)


@pytest.mark.parametrize(("key", "readers"), [
    ("n_positions", {"vllm", "vllm-old"}), ("max_seq_len", {"vllm", "vllm-old", "sglang"}),
    ("seq_length", {"vllm", "vllm-old", "sglang"}),
    ("model_max_length", {"vllm", "vllm-old", "sglang"}),
    ("max_sequence_length", {"vllm", "vllm-old", "sglang"}),
    ("max_seq_length", {"vllm", "vllm-old"}), ("seq_len", {"vllm", "vllm-old"}),
    ("max_target_positions", {"vllm", "vllm-old"})])
def test_stale_lengths(key, readers):
    config = llama(rope_theta=5e5, **{key: 512})
    assert {r for r in ALL if read(r, config).max_len == 512} == readers
    assert {read(r, config).max_len for r in set(ALL) - readers} == {LENGTH}


def test_model_max_length_wins_even_when_larger():
    config = llama(rope_theta=5e5, model_max_length=2 * LENGTH)
    assert {r: read(r, config).max_len for r in ("vllm", "vllm-old", "sglang")} == dict.fromkeys(
        ("vllm", "vllm-old", "sglang"), 2 * LENGTH)


@pytest.mark.parametrize("cap", [512, 1e30])
def test_tokenizer_cap_of_new_vllm(cap):
    config = llama(rope_theta=5e5)
    for reader in ALL:
        expected = 512 if reader == "vllm" and cap == 512 else LENGTH
        assert read(reader, config, {"model_max_length": cap}).max_len == expected
