"""What transformers assumes of a model's RoPE where its config.json is silent.

Taken from the config classes of transformers 5.24; a test compares them with those installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from extend.errors import CompatibilityError

FULL = "full_attention"
SLIDING = "sliding_attention"

_THETA = 10000.0
_FAMILY_THETA = {
    "apertus": 12e6, "apertus1p5_text": 12e6, "bailing_hybrid": 6e6, "bitnet": 5e5, "blt": 5e5,
    "cohere": 5e5, "cwm": 1e6, "ernie4_5": 5e5, "ernie4_5_moe": 5e5, "exaone": 5e5,
    "flex_olmo": 5e5, "fuyu": 25e3, "gpt_oss": 150e3, "helium": 1e5, "hy_v3": 11158840.0,
    "lfm2": 1e6, "lfm2_moe": 1e6, "llama4_text": 5e5, "longcat_flash": 1e7, "minimax": 1e6,
    "minimax_m2": 5e6, "minimax_m3_vl_text": 5e6, "ministral3": 1e6, "mixtral": 1e6, "phimoe": 1e6,
    "sarvam_moe": 8e6, "smollm3": 2e6, "solar_open": 1e6}
_FAMILY_PARTIAL = {
    "bamba": 0.5, "fuyu": 0.5, "glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "gpt_neox": 0.25,
    "mistral4": 0.5, "nemotron": 0.5, "persimmon": 0.5, "phi": 0.5, "qwen3_5_moe_text": 0.25,
    "qwen3_5_text": 0.25, "qwen3_next": 0.25, "recurrent_gemma": 0.5, "stablelm": 0.25}
# Scaled unless the config says otherwise: with no RoPE keys at all there is nothing to go by.
_SCALED = frozenset({"apertus", "apertus1p5_text", "cwm", "gpt_oss", "ministral3", "mistral4"})
# Families whose config class loads no scaled RoPE but this.
_ONLY_LONGROPE = frozenset({"phi3", "phi4_multimodal", "phimoe"})
WANTS_MSCALES = frozenset({"phimoe"})
"""Families that do not load without `short_mscale` and `long_mscale`."""
THREE_ENTRIES = frozenset({"phi3"})
"""Families whose class in transformers 4 takes type and two lists in `rope_scaling`, nothing else.
"""
NEEDS_HEAD_DIM = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "minimax",
                            "ministral", "mixtral"})
"""Families whose class holds a null where config.json has no `head_dim`; transformers 5 fails on it
for yarn, longrope and dynamic."""
LLAMA_CPP: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), frozenset({"llama3"})),
    "phi3": frozenset({"longrope"}),
    **dict.fromkeys(("granite", "smollm3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo",
                     "olmo2", "starcoder2", "gemma", "gemma2", "gemma3_text", "phi", "stablelm",
                     "nemotron", "glm", "glm4", "gpt_neox"), frozenset())}
"""The rope types that reach llama.cpp beside plain RoPE, linear and yarn, for the families looked
up: the converter writes their factors, and the run time uses them.

Source: ggml-org/llama.cpp, conversion/*.py (`generate_extra_tensors` of LlamaModel and
Phi3MiniModel) and src/models/*.cpp. Granite and SmolLM3 inherit the writing, but the one's
architecture has no such tensor and the other's graph does not use it.
"""
# One RoPE for each type of layer, in no spelling but a nested rope_parameters.
_NESTED_ONLY = frozenset({"beam", "deepseek_v4", "diffusion_gemma_text", "dory", "dots3_note_text",
                          "embedding_gemma2_text", "gemma4_text", "gemma4_unified_text", "laguna",
                          "lfm3", "mellum", "mimo_v2_flash", "modernbert", "modernbert-decoder",
                          "neomme", "step3p5", "t5gemma2_decoder", "t5gemma2_text", "ultrabert",
                          "zaya"})
# The class adds multimodal sections where no key names them.
_SECTIONED = frozenset({"cosmos3_edge_text", "hy_v4_vl_text"})


@dataclass(frozen=True, slots=True)
class FlatSpelling:
    """How transformers 4 spells RoPE per layer type without nesting.

    `rope_theta` and `rope_scaling` are those of full attention.

    Attributes:
        local_key: top-level key of the sliding layers' theta.
        theta, local_theta: what is assumed without the keys.
    """

    local_key: str
    theta: float
    local_theta: float


_GEMMA = FlatSpelling("rope_local_base_freq", 1e6, 1e4)
FLAT_SPELLINGS: Mapping[str, FlatSpelling] = {
    "gemma3_text": _GEMMA, "gemma3n_text": _GEMMA,
    "olmo3": FlatSpelling("rope_theta", 5e5, 5e5)}


def default_theta(model_type: str) -> float:
    return _FAMILY_THETA.get(model_type, _THETA)


def default_partial(model_type: str) -> float:
    """Rotated share of each head where no key names it."""
    return _FAMILY_PARTIAL.get(model_type, 1.0)


def check_type(family: str, rope_type: str) -> None:
    """Raise CompatibilityError where transformers does not load the family with such RoPE."""
    if family in _ONLY_LONGROPE and rope_type not in ("default", "longrope"):
        raise CompatibilityError(f"transformers loads model_type {family!r} with plain RoPE or "
                                 f"longrope only, not with {rope_type}; choose a method that "
                                 "changes theta, longrope, or resonance: true with this one")


def check_family(raw: Mapping[str, object], nested: Mapping[str, object] | None,
                 path: object) -> None:
    """Refuse by name a model whose RoPE is not what its keys say.

    Args:
        raw: the whole config.json.
        nested: `rope_parameters` where they are nested by layer type, else None.

    Raises:
        CompatibilityError: with the family and the reason.
    """
    family = raw.get("model_type")
    reason = None
    if nested is not None and raw.get("per_layer_config"):
        reason = "heads or windows differ from layer to layer (per_layer_config)"
    elif nested is not None and not isinstance(nested.get(FULL), Mapping):
        reason = f"RoPE differs by {', '.join(nested)}, and none is that of {FULL} layers"
    elif nested is not None and not raw.get("layer_types") and family not in FLAT_SPELLINGS:
        reason = "rope_parameters is nested by layer type, but there are no layer_types"
    elif nested is None and family in _NESTED_ONLY:
        reason = "RoPE differs by layer type, but rope_parameters is not nested by it"
    elif family in _SECTIONED:
        reason = "RoPE of the family has sections for text, height and width"
    elif family in _SCALED and not (raw.get("rope_parameters") or raw.get("rope_scaling")):
        reason = "RoPE of the family is scaled, but there is no rope_parameters"
    if reason is not None:
        raise CompatibilityError(f"{path}: model_type {family!r} is not supported like this: "
                                 f"{reason}; take another model, or complete the keys")
