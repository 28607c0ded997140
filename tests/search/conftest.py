"""A tiny model with a sibling, and text in lines."""

from pathlib import Path

import pytest
import torch

from tests.evaluate.conftest import one_thread, save_model  # noqa: F401  # for every test
from tests.tiny_text import write_text

NATIVE_LEN, TARGET_LEN = 512, 1024


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("search") / "my base")  # a space, to be quoted


@pytest.fixture(scope="session")
def sibling_dir(base_dir: Path) -> Path:
    """The base with its MLPs moved a little."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    directory = base_dir.parent / "sibling"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 600)
