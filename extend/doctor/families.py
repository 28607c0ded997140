"""What readers take for granted about a family of models, by `model_type`.

Only families whose rules were looked up stand here. For the others a doctor says that it applies
generic rules, because a default it does not know is a wrong frequency. The defaults of theta and of
the rotated share are those of `extend.model_config.families`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from extend.model_config.families import default_partial, default_theta

GEMMA3 = "gemma3_text"
GEMMA3_THETA, GEMMA3_LOCAL_THETA = 1e6, 1e4


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Special rules.

    Attributes:
        theta_key: top-level key of theta in transformers.
        partial_key: top-level key of the rotated share of a head.
        type_wins: transformers 4 copies the old key `type` over `rope_type`.
        gguf_partial: llama.cpp's converter writes the number of rotated channels.
        known: False for the generic rules.
    """

    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    type_wins: bool = True
    gguf_partial: bool = False
    known: bool = True


_PLAIN = Family()
_NO_COPY = Family(type_wins=False)
_PARTIAL = Family(gguf_partial=True)

# transformers 4: the configuration classes of 4.57. GGUF: ggml-org/llama.cpp, conversion/*.py
# (`add_rope_dimension_count`); which rope types it holds is in extend.model_config.families.
FAMILIES: dict[str, Family] = {
    "llama": _PLAIN,
    "mistral": _NO_COPY,
    "mixtral": _NO_COPY,
    "granite": _PLAIN,
    "smollm3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2_moe": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3_moe": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": _PLAIN,
    "starcoder2": _PLAIN,
    "gemma": _NO_COPY,
    "gemma2": _NO_COPY,
    GEMMA3: _PLAIN,
    "phi": _PARTIAL,
    "phi3": replace(_PARTIAL, type_wins=False),
    "stablelm": _PARTIAL,
    "nemotron": replace(_PARTIAL, type_wins=False),
    "glm": _PARTIAL,
    "glm4": _PARTIAL,
    "gpt_neox": replace(_PARTIAL, theta_key="rotary_emb_base", partial_key="rotary_pct"),
}
_GENERIC = Family(known=False)


def family_of(config: Mapping[str, Any]) -> Family:
    """The rules of a config.json; generic ones for a `model_type` that is not in `FAMILIES`."""
    return FAMILIES.get(str(config.get("model_type")), _GENERIC)


def theta_default(config: Mapping[str, Any]) -> float:
    """What transformers takes for theta when no key names it."""
    kind = str(config.get("model_type"))
    return GEMMA3_THETA if kind == GEMMA3 else default_theta(kind)


def partial_default(config: Mapping[str, Any]) -> float:
    """What transformers takes for the rotated share of a head when no key names it."""
    return default_partial(str(config.get("model_type")))


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Channels per head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
