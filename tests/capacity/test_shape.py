"""Parameters counted from a config against those of transformers' own models."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from extend.capacity import model_shape
from extend.model_config import parse_config

SIZES = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 16,
         "pad_token_id": 0}
MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES = [
    ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}),
    ("gemma", {}), ("gemma2", {}), ("gemma3_text", {}), ("phi3", {}), ("olmo2", {}),
    ("granite", {}), ("smollm3", {}), ("starcoder2", {}), ("glm4", {}), ("cohere", {}),
    ("nemotron", {}), ("seed_oss", {}), ("mixtral", {"num_local_experts": 4}),
    ("qwen3_moe", MIXED | {"mlp_only_layers": [1]}),
    ("qwen2_moe", MIXED | {"shared_expert_intermediate_size": 80}),
    ("olmoe", {"num_experts": 4})]


@pytest.mark.parametrize("family,keys", FAMILIES)
def test_parameters_of_families(family, keys):
    config = AutoConfig.for_model(family, **SIZES | keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(p.numel() for p in model.parameters())
    found = model_shape(parse_config(config.to_dict(), Path("config.json")))
    assert found.parameters == expected
    # Each product of a token with a matrix, the embedding's lookup left out.
    if not found.num_experts:
        matrices = [p for name, p in model.named_parameters() if p.ndim > 1]
        looked_up = 0 if found.tied else found.embedding
        assert found.matrix_parameters == sum(p.numel() for p in matrices) - looked_up
