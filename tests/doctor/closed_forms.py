"""Frequencies and readings for the tests of readers, written out by hand."""

import math

import numpy as np
import pytest

from extend.doctor.readers import READERS, read_with
from extend.doctor.reading import ModelFiles
from tests.doctor.configs import HEAD_DIM, SIZES

LENGTH = SIZES["max_position_embeddings"]
MSCALE = 0.1 * math.log(16) + 1
SU = math.sqrt(1 + math.log(16) / math.log(256))
ALL = list(READERS)
V4 = ["transformers-4.4", "transformers-4", "vllm-old"]
V5 = ["transformers-5", "vllm", "sglang", "llama.cpp"]


def plain(theta: float = 5e5, dim: int = HEAD_DIM) -> np.ndarray:
    return theta ** (-np.arange(0, dim, 2) / dim)


def by_turns(original: int) -> np.ndarray:
    """llama3 x16, 1 to 4 turns."""
    turns = original * plain() / (2 * math.pi)
    kept = np.clip((turns - 1) / (4 - 1), 0, 1)
    return kept * plain() + (1 - kept) * plain() / 16


def ramp(original: int, round_ends: bool = True) -> np.ndarray:
    """YaRN x16, 32 to 1 turns."""
    low, high = (HEAD_DIM * math.log(original / (count * 2 * math.pi)) / (2 * math.log(5e5))
                 for count in (32, 1))
    if round_ends:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, HEAD_DIM - 1)
    scaled_share = np.clip((np.arange(HEAD_DIM // 2) - low) / (high - low), 0, 1)
    return plain() * (1 - scaled_share) + plain() / 16 * scaled_share


def fixed_dynamic() -> np.ndarray:
    """Dynamic x4 at once."""
    return plain(5e5 * (4 * 4 - 3) ** (HEAD_DIM / (HEAD_DIM - 2)))


def read(reader: str, config: dict, tokenizer: dict | None = None):
    return read_with(reader, ModelFiles(config, tokenizer or {}, {}))


def check(reading, inv_freq: np.ndarray, attention: float, length: int) -> None:
    assert not reading.refusal and not reading.unknown
    # Two orders of the same fp64 operations.
    np.testing.assert_allclose(reading.main.short, inv_freq, rtol=1e-12)
    assert reading.main.attention_factor == pytest.approx(attention, rel=1e-12)
    assert reading.max_len == length
