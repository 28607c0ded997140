"""Tiny models of several families, with full attention and with windows."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SEQ_LEN, VOCABULARY = 64, 50
DOCUMENTS = (0, 13, 43, 44, 64)  # where those of a packed row of SEQ_LEN tokens begin
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
WINDOWED = {  # with windows of odd and even length, in all layers or in some
    "mistral window": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "phi3 window": (Phi3Config, Phi3ForCausalLM, {"sliding_window": 9, "pad_token_id": 0}),
    "qwen2 window": (
        Qwen2Config, Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
    ),
    "qwen3 window": (
        Qwen3Config, Qwen3ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 2} | ALTERNATING,
    ),
    "gemma2 window": (
        Gemma2Config, Gemma2ForCausalLM,
        {"sliding_window": 20, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8}
        | ALTERNATING,
    ),
    "gemma3 window": (
        Gemma3TextConfig, Gemma3ForCausalLM,
        {"sliding_window": 7, "query_pre_attn_scalar": 5} | ALTERNATING,
    ),
}  # fmt: skip
MODELS |= WINDOWED


def make_model(name, attention, **options):
    config_class, model_class, own_options = MODELS[name]
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": VOCABULARY, "initializer_range": 0.2,
    }  # fmt: skip
    config = config_class(**(sizes | own_options | options))
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=attention)


def make_ids(rows=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (rows, SEQ_LEN), generator=generator)
