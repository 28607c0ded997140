"""Tiny models to subtract, shared by the tests of deltas and of extraction; never written to."""

import shutil

import pytest
import torch

from tests.adapter_format.tiny_models import Models, make_models


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Models:
    """fp32, untied head, no biases."""
    return make_models(tmp_path_factory.mktemp("llama"), "llama", torch.float32)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory) -> Models:
    """bf16, tied head, biases on q, k and v."""
    return make_models(tmp_path_factory.mktemp("qwen2"), "qwen2", torch.bfloat16, tied=True)


@pytest.fixture
def copies(llama, tmp_path) -> Models:
    """Copies of the Llama models that a test may damage, alone in their directory."""
    root = tmp_path / "models"
    for name in ("base", "tuned", "target"):
        shutil.copytree(getattr(llama, name), root / name)
    return Models(base=root / "base", tuned=root / "tuned", target=root / "target")
