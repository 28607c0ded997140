"""A target of random weights whose own answers are long enough to learn from."""

import pytest
import torch
from transformers import LlamaForCausalLM

from extend.tokenizer import load_tokenizer
from extend.transfer.lesson import build_lesson
from extend.transfer.rows import retrieval_rows
from tests.adapter_format.fixtures import one_thread
from tests.train.tiny import save_examples, save_model

PROMPTS = [list(range(2, 2 + n)) for n in (5, 9, 7, 12, 6, 8)]
MAX_NEW = 8


__all__ = ["one_thread"]  # a fixture


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """Checkpoint and tokenizer; never written to."""
    return save_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    return save_examples(tmp_path_factory.mktemp("examples"), count=12)


@pytest.fixture(scope="session")
def tokenizer(directory):
    return load_tokenizer(directory)


@pytest.fixture
def model(directory) -> LlamaForCausalLM:
    """A fresh copy, in fp32."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def long_rows(tokenizer):
    return retrieval_rows(tokenizer, length=192, count=4, seed=0, facts=(1,))


@pytest.fixture
def lesson(model, long_rows):
    return build_lesson(model, PROMPTS, long_rows, max_new=MAX_NEW)


def random_deltas(model, *, seed: int, scale: float) -> dict[str, torch.Tensor]:
    """A delta for every parameter, as large as a share of the parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * p.detach().square().mean().sqrt()
            * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
