"""A tiny model on disk that every evaluation test may read."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_text import make_tokenizer, write_text


def make_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Two layers, grouped heads, random weights large enough that its choices differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "initializer_range": 0.3,
        "tie_word_embeddings": True, **changes})
    return LlamaForCausalLM(config).eval()


def save_model(directory: Path, seed: int = 0, kind: str = "bytes-bos", **changes: object) -> Path:
    make_model(seed, **changes).save_pretrained(directory)
    make_tokenizer(kind).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "held-out.txt", 400)
