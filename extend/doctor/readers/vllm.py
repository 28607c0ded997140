"""vLLM, by the rules of two times.

Old: on transformers 4, without a look at the tokenizer; YaRN's length is the native length times
the factor, `attn_factor` multiplies and `attention_factor` is not read. New: on transformers 5,
the tokenizer's length counts, YaRN is as in transformers (pull request 56446).

Source: vllm-project/vllm, vllm/config/model.py (`_get_and_verify_max_len`),
vllm/transformers_utils/config.py at 0036026 and model_arch_config_convertor.py, and
vllm/model_executor/layers/rotary_embedding/.
"""

from collections.abc import Mapping
from typing import Any

from extend.doctor.families import GEMMA3, family_of
from extend.doctor.readers import transformers_4, transformers_5
from extend.doctor.readers.found import (
    Found,
    conflicting_types,
    dynamic_at_once,
    origins,
    yarn_attention,
)
from extend.doctor.reading import (
    FULL,
    LayerRope,
    ModelFiles,
    Refused,
    Unknown,
    need,
    rope_of,
)
from extend.model_config import longrope_mscale, yarn_mscale

_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
                "model_max_length", "max_target_positions", "max_sequence_length",
                "max_seq_length", "seq_len")
_NOT_MULTIPLIED = ("su", "longrope", "llama3")
_KNOWN = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Models that copy the native length at the top level into the entries.
_TOP_WINS = ("llama", "mistral", "phi3")

Read = tuple[dict[str, LayerRope], int, dict[str, str]]


def read_vllm_old(files: ModelFiles) -> Read:
    """vLLM 0.10 on transformers 4."""
    config = files.config
    if not family_of(config).type_wins and conflicting_types(config.get("rope_scaling") or {}):
        raise Refused("rope_scaling holds a type and another rope_type")
    found = {name: _renamed(entry) for name, entry in transformers_4.find(config).items()}
    main = found[FULL]
    if main.kind == "yarn":
        need(main.parameters, "original_max_position_embeddings")
    length, origin = _shortest(config)
    if main.kind == "yarn":
        length = int(main.original_len(length) * main.parameters["factor"])
        origin = "original_max_position_embeddings x factor"
    elif config.get("model_type") != GEMMA3:
        length, origin = _multiplied(length, origin, main)
    if config.get("model_type") in _TOP_WINS:
        main = found[FULL] = _with_top_level(main, config)
    layers = {name: _compute(entry, config, length, old=True) for name, entry in found.items()}
    return layers, length, origins(found, origin)


def read_vllm(files: ModelFiles) -> Read:
    """vLLM from September 2026 on transformers 5."""
    config = files.config
    for key in ("rope_scaling", "rope_parameters"):
        if conflicting_types(config.get(key) or {}):
            raise Refused(f"{key} holds a type and another rope_type")
    found = {name: _renamed(entry) for name, entry in transformers_5.find(config).items()}
    main = found[FULL]
    length, origin = _shortest(config)
    cap = files.tokenizer_config.get("model_max_length")
    if cap is not None and cap < length:
        length, origin = int(cap), "tokenizer_config.json model_max_length"
    if config.get("model_type") != GEMMA3 and main.kind != "yarn":
        length, origin = _multiplied(length, origin, main)
    top = config.get("original_max_position_embeddings")
    if main.kind == "longrope" and top is not None:
        length, origin = top, "original_max_position_embeddings, taken for longrope"
    layers = {name: _compute(entry, config, length, old=False) for name, entry in found.items()}
    return layers, length, origins(found, origin)


def _renamed(found: Found) -> Found:
    if found.kind != "su":
        return found
    return Found({**found.parameters, "rope_type": "longrope"}, found.origin)


def _with_top_level(found: Found, config: Mapping[str, Any]) -> Found:
    key, top = "original_max_position_embeddings", config.get("original_max_position_embeddings")
    if top is None or found.kind == "default":
        return found
    return Found({**found.parameters, key: top}, {**found.origin, key: key})


def _shortest(config: Mapping[str, Any]) -> tuple[int, str]:
    """The smallest of all length keys; `model_max_length` wins over them."""
    if config.get("model_max_length"):
        return config["model_max_length"], "model_max_length"
    present = [(config[key], key) for key in _LENGTH_KEYS if config.get(key) is not None]
    return min(present, key=lambda pair: pair[0])


def _multiplied(length: int, origin: str, found: Found) -> tuple[int, str]:
    factor = found.parameters.get("factor")
    if found.kind in _NOT_MULTIPLIED or factor is None:
        return length, origin
    return int(length * factor), f"{origin} x factor {factor:g}"


def _compute(found: Found, config: Mapping[str, Any], max_len: int, *, old: bool) -> LayerRope:
    if config.get("dual_chunk_attention_config"):
        return _in_chunks(found, config)
    if found.kind == "proportional" and not old:
        raise Unknown("whether it takes rope_type proportional for this model")
    if found.kind not in _KNOWN:
        raise Refused(f"rope_type {found.kind!r} is not one it knows")
    if found.kind == "dynamic":
        return dynamic_at_once(found, config)
    parameters, original = found.parameters, found.original_len(config["max_position_embeddings"])
    attention = 1.0
    if found.kind == "llama3":
        need(parameters, "original_max_position_embeddings")
    elif found.kind == "yarn":
        attention = attention_by_multiplier(parameters) if old else yarn_attention(parameters)
    elif found.kind == "longrope":
        need(parameters, "original_max_position_embeddings")
        return _longrope(parameters, config, original, max_len)
    return rope_of(parameters, config, original, attention)


def attention_by_multiplier(parameters: Mapping[str, Any]) -> float:
    """YaRN's attention factor where only the key `attn_factor` is read, as a multiplier."""
    return yarn_mscale(parameters["factor"]) * parameters.get("attn_factor", 1.0)


def _in_chunks(found: Found, config: Mapping[str, Any]) -> LayerRope:
    """Dual chunk attention: plain frequencies whatever the rope_type, positions within chunks."""
    chunks = config["dual_chunk_attention_config"]
    plain = rope_of({**found.parameters, "rope_type": "default"}, config, 1)
    where = f"within chunks of {chunks.get('chunk_size')} (dual_chunk_attention_config)"
    return LayerRope(parameters={**plain.parameters, "positions": where}, short=plain.short,
                     long=plain.long, attention_factor=1.0)


def _longrope(parameters: Mapping[str, Any], config: Mapping[str, Any], original: int,
              max_len: int) -> LayerRope:
    """One list for all sequences, chosen by the length the engine was started with."""
    layer = rope_of(parameters, config, original)
    rule = longrope_mscale(config["max_position_embeddings"] / original, original)
    chosen = "long" if max_len > original else "short"
    values = getattr(layer, chosen)
    return LayerRope(parameters=layer.parameters, short=values, long=values,
                     attention_factor=parameters.get(f"{chosen}_mscale", rule))
