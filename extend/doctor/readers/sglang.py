"""SGLang on transformers 5.

Source: sgl-project/sglang, python/sglang/srt/utils/hf_transformers/common.py
(`get_context_length`, `get_rope_config`), layers/rotary_embedding/factory.py and yarn.py at
eb047c1 and 0b1fd02, models/gemma3_causal.py at 038c87d.
"""

from collections.abc import Mapping
from typing import Any

from extend.doctor.families import GEMMA3
from extend.doctor.readers import transformers_5
from extend.doctor.readers.found import Found, dynamic_at_once, origins
from extend.doctor.readers.vllm import attention_by_multiplier
from extend.doctor.reading import (
    FULL,
    LayerRope,
    ModelFiles,
    Refused,
    Unknown,
    rope_of,
)
from extend.model_config import longrope_mscale

_LENGTH_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length",
                "max_position_embeddings")
_KNOWN = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def read_sglang(files: ModelFiles) -> tuple[dict[str, LayerRope], int, dict[str, str]]:
    """The first length key there is, times the factor unless a native length is named."""
    config = files.config
    found = transformers_5.find(config)
    if len(found) > 1 and not _is_plain_gemma3(found, config):
        raise Unknown("how it reads a RoPE that differs by layer type, or a scaled one in Gemma 3")
    main = found[FULL]
    key = next(key for key in _LENGTH_KEYS if config.get(key) is not None)
    length, origin = config[key], key
    factor = main.parameters.get("factor")
    # Of llama3, yarn and longrope, transformers 5 has always put one there.
    named = "original_max_position_embeddings" in main.parameters
    if factor is not None and not named and len(found) == 1:
        length, origin = int(length * factor), f"{key} x factor {factor:g}"
    layers = {name: _compute(entry, config) for name, entry in found.items()}
    return layers, length, origins(found, origin)


def _is_plain_gemma3(found: Mapping[str, Found], config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == GEMMA3 and all(
        entry.kind == "default" for entry in found.values())


def _compute(found: Found, config: Mapping[str, Any]) -> LayerRope:
    if config.get("dual_chunk_attention_config"):
        raise Unknown("its dual chunk attention")
    if found.kind not in _KNOWN:
        raise Refused(f"rope_type {found.kind!r} is not one it knows")
    if found.kind == "dynamic":
        return dynamic_at_once(found, config)
    length = config["max_position_embeddings"]
    parameters, original = found.parameters, found.original_len(length)
    attention = attention_by_multiplier(parameters) if found.kind == "yarn" else 1.0
    layer = rope_of(parameters, config, original, attention)
    if found.kind != "longrope":
        return layer
    # It applies a factor to each list; where they differ, that of the long sequences is reported.
    rule = longrope_mscale(length / original, original)
    return LayerRope(parameters=layer.parameters, short=layer.short, long=layer.long,
                     attention_factor=parameters.get("long_mscale", rule))
