"""Shapes of well-known models against what is published of them."""

import pytest

from extend.recipe_plan.facts import _presumed
from extend.recipe_plan.known import KNOWN, known_config

# As the Hub counts the parameters of their safetensors files.
PUBLISHED = {"meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
             "meta-llama/Llama-3.1-8B": 8_030_261_248,
             "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
             "mistralai/Mistral-7B-v0.1": 7_241_732_096, "Qwen/Qwen3-8B": 8_190_735_360,
             "google/gemma-3-270m": 268_098_176,
             "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008}


@pytest.mark.parametrize("repository", PUBLISHED)
def test_parameters(repository: str):
    for value in (repository, f"{repository}@main", f"../data/{repository.rpartition('/')[2]}/"):
        facts = _presumed(value, "missing", "")
        assert facts.shape.parameters == PUBLISHED[repository]
        assert facts.num_bytes == 2 * PUBLISHED[repository]


def test_every_known_config_is_read():
    assert all(_presumed(repository, "hub", "").shape is not None for repository in KNOWN)


def test_windows():
    gemma = _presumed("google/gemma-3-270m", "hub", "").shape
    assert gemma.windows.count(512) == 15 and gemma.windows.count(None) == 3
    assert set(_presumed("mistralai/Mistral-7B-v0.1", "hub", "").shape.windows) == {4096}


def test_others_are_not_guessed():
    assert known_config("meta-llama/Meta-Llama-3-8B-Instruct-sibling") is None
    assert _presumed("org/model", "hub", "").shape is None
