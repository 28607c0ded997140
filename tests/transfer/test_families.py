"""Biases, q and k norms, windows, RoPE by layer, fused projections, experts: all the same here."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

from extend.transfer.fit import FIT, fit_weights
from extend.transfer.generate import continue_prompts
from extend.transfer.lesson import build_lesson
from extend.transfer.objective import judge
from extend.transfer.repair import REPAIR, repair_model
from extend.transfer.rows import Row
from tests.transfer.conftest import MAX_NEW, PROMPTS, random_deltas
from tests.transfer.test_generate import by_definition

SIZES = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 8}),
    "Mistral": ("MistralConfig", {"sliding_window": 6}),
    "Gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 6,
                                    "query_pre_attn_scalar": 8,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi3": ("Phi3Config", {}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4})}


@pytest.fixture(params=FAMILIES)
def family(request):
    config, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(
        getattr(transformers, config)(**SIZES, **changes)).float().eval()
    with torch.no_grad():  # biases and norms away from 0 and 1
        for name, delta in random_deltas(model, seed=9, scale=0.3).items():
            model.get_parameter(name).add_(delta)
    return model


def test_a_model_of_this_family(family):
    found = continue_prompts(family, PROMPTS, max_new=MAX_NEW, stop=())
    assert found == [by_definition(family, prompt, MAX_NEW) for prompt in PROMPTS]
    rows = [Row([(7 * i + j) % 200 + 2 for j in range(100)], [False] * 90 + [True] * 10)
            for i in range(4)]
    lesson = build_lesson(family, PROMPTS, rows, max_new=MAX_NEW)
    deltas = random_deltas(family, seed=1, scale=0.2)
    fitted = fit_weights(family, deltas, lesson, settings=replace(FIT, steps=3))
    assert fitted.scores["fitted"].objective(0.5) < fitted.scores["plain"].objective(0.5)
    merged = copy.deepcopy(family)
    with torch.no_grad():
        for name, delta in deltas.items():
            merged.get_parameter(name).add_(fitted.weights[name] * delta)
    # A token that is sent to another expert costs more than rounding does.
    assert judge(merged, lesson).to_json() == pytest.approx(
        fitted.scores["fitted"].to_json(), abs=1e-3)
    done = repair_model(merged, lesson, settings=replace(REPAIR, steps=6, lr=1e-3))
    assert done.scores["repaired"].objective(0.5) < done.scores["merged"].objective(0.5)
