"""Tiny models and their adapters, shared by the tests of merging; never written to."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from extend.adapter import extract
from tests.adapter_format.tiny_models import Models, make_models

CASES = {"llama-fp32": ("llama", torch.float32, False),
         "llama-bf16": ("llama", torch.bfloat16, False),
         "qwen2-fp32": ("qwen2", torch.float32, False),
         "qwen2-bf16-tied": ("qwen2", torch.bfloat16, True)}


@dataclass(frozen=True)
class Case:
    """Models of one family and dtype, with an adapter of rank 8 and one of full rank."""

    models: Models
    adapter: Path
    full: Path
    dtype: torch.dtype
    tied: bool


def make_case(root: Path, name: str) -> Case:
    family, dtype, tied = CASES[name]
    models = make_models(root, family, dtype, tied=tied)
    return Case(models=models, dtype=dtype, tied=tied,
                adapter=extract(models.base, models.tuned, root / "adapter", rank=8),
                full=extract(models.base, models.tuned, root / "full", rank=64))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=CASES)
def case(request, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama-fp32")


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("tied"), "qwen2-bf16-tied")


@pytest.fixture
def target(llama, tmp_path) -> Path:
    """A copy of the Llama target that a test may damage."""
    return Path(shutil.copytree(llama.models.target, tmp_path / "inputs" / "target"))


@pytest.fixture
def adapter(llama, tmp_path) -> Path:
    """A copy of the Llama adapter that a test may damage."""
    return Path(shutil.copytree(llama.adapter, tmp_path / "inputs" / "adapter"))
