"""Tiny GGUF files made from tiny models as llama.cpp's converter makes them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3,
                 "gemma3_text": MODEL_ARCH.GEMMA3}
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
         "max_position_embeddings": 512}
F32 = GGMLQuantizationType.F32


def make_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model; its norms are near 1 by few enough bits that adding 1 loses none."""
    torch.manual_seed(0)
    theta = {} if "rope_parameters" in changes or family == "gemma3_text" else {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
    own = {"num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 32} \
        if family == "gemma3_text" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        family, **{**SIZES, "tie_word_embeddings": family != "llama", "bos_token_id": 1,
                   "eos_token_id": 2, "pad_token_id": 0, **theta, **own, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.randint(-64, 64, parameter.shape) / 256)
            elif name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: llama.cpp puts channel c and c + half of a head side by side."""
    size = values.shape[0] // heads
    order = [head * size + half * (size // 2) + pair
             for head in range(heads) for pair in range(size // 2) for half in range(2)]
    return values[order]


def stored(model: PreTrainedModel, name: str) -> np.ndarray:
    """A weight as the converter writes it."""
    values, config = model.state_dict()[name].float().numpy(), model.config
    if config.model_type == "llama" and "q_proj" in name:
        return permute(values, config.num_attention_heads)
    if config.model_type == "llama" and "k_proj" in name:
        return permute(values, config.num_key_value_heads)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values


def names_of(model: PreTrainedModel) -> dict[str, str]:
    """Name in the checkpoint -> name in the file, by the gguf package's own table."""
    table = get_tensor_name_map(ARCHITECTURES[model.config.model_type],
                                model.config.num_hidden_layers)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias"))
            for name in model.state_dict() if name not in tied}


def write_gguf(path: Path, model: PreTrainedModel,
               types: dict[str, GGMLQuantizationType] | None = None,
               keys: dict[str, Any] | None = None, raw: dict[str, tuple] | None = None,
               **options: Any) -> Path:
    """Write a model.

    Args:
        types: part of a checkpoint's name -> quantization type; fp32 for the rest.
        keys: more metadata below the architecture, or at the top with a leading dot.
        raw: more tensors, name -> (data, type).
    """
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = GGUFWriter(path, architecture, **options)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for key, value in (keys or {}).items():
        name = key[1:] if key.startswith(".") else f"{architecture}.{key}"
        add_value(writer, name, value)
    for name, new in names_of(model).items():
        kind = next((kind for part, kind in (types or {}).items() if part in name), F32)
        data = stored(model, name)
        writer.add_tensor(new, quantize(data, kind), raw_dtype=kind)
    for name, (data, kind) in (raw or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: GGUFWriter, name: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}[type(value)]
    add(name, value)


def word_tokens() -> dict[str, Any]:
    """The keys of a byte-level tokenizer without merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = [*sorted(ByteLevel.alphabet())[:VOCAB - 4], "!?"]
    return {".tokenizer.ggml.model": "gpt2", ".tokenizer.ggml.pre": "gpt-2",
            ".tokenizer.ggml.tokens": ["<pad>", "<s>", "</s>", *letters],
            ".tokenizer.ggml.token_type": [3] * 3 + [1] * len(letters),
            ".tokenizer.ggml.merges": ["! ?"], ".tokenizer.ggml.bos_token_id": 1,
            ".tokenizer.ggml.eos_token_id": 2, ".tokenizer.ggml.padding_token_id": 0}
