"""Configs of well-known models: what a plan needs of a model that is not here yet.

Only the keys that decide sizes and windows, as their config.json has them on the Hub. Fine-tunes
have their base's. Any other model takes a config.json of its own (--config).
"""

from collections.abc import Mapping
from typing import Any

_LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_LLAMA_70B = {**_LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672,
              "num_hidden_layers": 80, "num_attention_heads": 64}
_LLAMA_31 = {"max_position_embeddings": 131072, "rope_scaling": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192}}
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096,
    "rope_theta": 10000.0}
_QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0}
_GEMMA3_270M: dict[str, Any] = {
    "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512,
    "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3}
_SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}

KNOWN: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.1-8B": {**_LLAMA_8B, **_LLAMA_31},
    "meta-llama/Llama-3.1-8B-Instruct": {**_LLAMA_8B, **_LLAMA_31},
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "google/gemma-3-270m": _GEMMA3_270M,
    "google/gemma-3-270m-it": _GEMMA3_270M,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M}


def known_config(value: str) -> tuple[str, Mapping[str, Any]] | None:
    """(repository, config) of a repository id, or of a directory called as a repository is."""
    wanted = value.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
    return next(((repo, config) for repo, config in KNOWN.items()
                 if repo.rpartition("/")[2].lower() == wanted), None)
