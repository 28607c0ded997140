"""llama.cpp: what convert_hf_to_gguf.py writes, and what the run time computes from it.

The converter loads the config through transformers 5. Theta is stored in fp32, which moves no
angle by as much as fp32 angles themselves are off; that is not modelled.

Source: ggml-org/llama.cpp, conversion/base.py at 00bd27a (TextModel), llama.py at 0274f0f, phi.py
at 051139f, qwen.py and gemma.py; src/llama-context.cpp at 001d906 (attention factor of YaRN).
"""

from collections.abc import Mapping
from typing import Any

from extend.doctor.families import GEMMA3, family_of
from extend.doctor.readers import transformers_5
from extend.doctor.readers.found import Found, origins
from extend.doctor.reading import (
    LayerRope,
    ModelFiles,
    Refused,
    Unknown,
    rope_of,
)
from extend.model_config import longrope_mscale, yarn_mscale
from extend.model_config.families import LLAMA_CPP

_FALLBACK = 8192  # native length of llama3 when there is none at the top level
_DROPPED = "not carried over to llama.cpp"


def read_llama_cpp(files: ModelFiles) -> tuple[dict[str, LayerRope], int, dict[str, str]]:
    """What a GGUF made from this checkpoint computes, at its own context length."""
    config = files.config
    try:
        found = transformers_5.find(config)
    except Refused as reason:
        raise Unknown(f"what the converter makes of a file that transformers refuses ({reason})"
                      ) from None
    if len(found) > 1 and config.get("model_type") != GEMMA3:
        raise Unknown("how it reads a RoPE that differs by layer type in this model")
    entries = {name: _converted(entry, config) for name, entry in found.items()}
    length = config["max_position_embeddings"]
    layers = {name: _compute(entry, config, length) for name, entry in entries.items()}
    return layers, length, origins(entries, "max_position_embeddings")


def _converted(found: Found, config: Mapping[str, Any]) -> Found:
    """The parameters as they are in the GGUF."""
    family, parameters, origin = family_of(config), dict(found.parameters), dict(found.origin)
    partial = parameters["partial_rotary_factor"]
    if not family.known and (partial != 1 or found.kind in ("llama3", "longrope")):
        raise Unknown("what its converter does with this rope_type or a partly rotated head for "
                      f"model_type {config.get('model_type')!r}")
    if partial != 1 and not family.gguf_partial:
        parameters["partial_rotary_factor"] = 1.0
        origin["partial_rotary_factor"] = _DROPPED
    carried = LLAMA_CPP.get(str(config.get("model_type")), frozenset())
    if found.kind == "llama3" and "llama3" in carried:
        key = "original_max_position_embeddings"
        parameters[key] = config.get(key) or _FALLBACK
        origin[key] = key if config.get(key) else f"its fallback: no {key} at the top level"
    elif found.kind == "yarn":
        parameters.pop("truncate", None)
    elif not (found.kind in ("default", "linear")
              or (found.kind in ("longrope", "su") and "longrope" in carried)):
        kept = ("rope_theta", "partial_rotary_factor")
        parameters = {"rope_type": "default", **{k: parameters[k] for k in kept}}
        origin["rope_type"] = f"rope_type {found.kind} {_DROPPED}"
    return Found(parameters, origin)


def _compute(found: Found, config: Mapping[str, Any], length: int) -> LayerRope:
    original, attention = found.original_len(length), 1.0
    if found.kind == "yarn":
        # attention_factor is written, but the run time puts its own rule in its place.
        attention = yarn_mscale(found.parameters["factor"])
    elif found.kind == "longrope":
        attention = longrope_mscale(length / original, original)
    layer = rope_of(found.parameters, config, original, attention)
    # The list is chosen once, by the length of the context that was allocated.
    values = layer.long if length > original else layer.short
    return LayerRope(parameters=layer.parameters, short=values, long=values,
                     attention_factor=attention)
