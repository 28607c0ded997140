"""transformers 4: a top-level `rope_theta` and `rope_scaling`; `rope_parameters` is not read.

Source: huggingface/transformers, modeling_rope_utils.py: of 4.57 with `rope_config_validation`,
and at commit ef46806472a64b0013ed413781e3afed82bfa047 for the older YaRN; configuration_llama.py,
configuration_phi3.py and configuration_gemma3.py of the same versions.
"""

import math
from collections.abc import Mapping
from typing import Any

from extend.doctor.families import (
    GEMMA3,
    GEMMA3_LOCAL_THETA,
    family_of,
    partial_default,
    theta_default,
)
from extend.doctor.readers.found import (
    Found,
    check_required,
    complete,
    dynamic_by_length,
    first,
    longrope_attention,
    origins,
    yarn_attention,
)
from extend.doctor.reading import FULL, LayerRope, ModelFiles, Refused, need, rope_of

_KNOWN = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ABSENT = "the default, because it is absent at the top level"
_PHI3_ENTRIES = 3  # type, short_factor, long_factor, and nothing else


def read_transformers_4(files: ModelFiles) -> tuple[dict[str, LayerRope], int, dict[str, str]]:
    """transformers 4.57."""
    return _read(files, old=False)


def read_transformers_4_old(files: ModelFiles) -> tuple[dict[str, LayerRope], int, dict[str, str]]:
    """Before YaRN counted from original_max_position_embeddings."""
    return _read(files, old=True)


def _read(files: ModelFiles, *, old: bool) -> tuple[dict[str, LayerRope], int, dict[str, str]]:
    config = files.config
    found = find(config)
    layers = {name: compute(entry, config, old=old) for name, entry in found.items()}
    origin = origins(found, "max_position_embeddings")
    if old and found[FULL].kind == "yarn":
        origin["original_max_position_embeddings"] = "max_position_embeddings"
    return layers, config["max_position_embeddings"], origin


def find(config: Mapping[str, Any]) -> dict[str, Found]:
    """What the configuration class holds after loading.

    Raises:
        Refused: its validation raises.
    """
    family, scaling = family_of(config), config.get("rope_scaling")
    if scaling is not None:
        _check_phi3(config, scaling)
    entries = scaling or {}
    names = ("type", "rope_type") if family.type_wins else ("rope_type", "type")
    rope_type = next((str(entries[k]) for k in names if entries.get(k) is not None), None)
    if scaling is not None and rope_type is None:
        raise Refused("rope_scaling has neither rope_type nor type")
    if config.get("model_type") == "phi3" and rope_type in ("su", "yarn"):
        rope_type = "longrope"
    values = {
        "rope_theta": first([(family.theta_key, config.get(family.theta_key))],
                            theta_default(config), _ABSENT),
        "partial_rotary_factor": first([(family.partial_key, config.get(family.partial_key))],
                                       partial_default(config), _ABSENT)}
    found = {FULL: complete(entries, "rope_scaling", rope_type or "default", **values)}
    check_required(found[FULL])
    if config.get("model_type") == GEMMA3:
        local = first([("rope_local_base_freq", config.get("rope_local_base_freq"))],
                      GEMMA3_LOCAL_THETA, _ABSENT)
        found["sliding_attention"] = complete({}, "", "default", **{**values, "rope_theta": local})
    return found


def _check_phi3(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> None:
    if config.get("model_type") == "phi3" and len(scaling) != _PHI3_ENTRIES:
        raise Refused("the Phi-3 class takes a rope_scaling of exactly type, short_factor and "
                      f"long_factor, and finds {', '.join(scaling)}")


def compute(found: Found, config: Mapping[str, Any], *, old: bool) -> LayerRope:
    """The frequencies that the model's rotary embedding computes.

    Raises:
        Refused: a rope_type without a function, or an entry missing that it reads.
    """
    parameters, length = found.parameters, config["max_position_embeddings"]
    if found.kind not in _KNOWN:
        raise Refused(f"rope_type {found.kind!r} is not one it knows")
    if found.kind == "dynamic":
        return dynamic_by_length(found, config)
    original, attention = length, 1.0
    if found.kind == "llama3":
        need(parameters, "original_max_position_embeddings")
        original = found.original_len(length)
    elif found.kind == "yarn":
        original = length if old else found.original_len(length)
        attention = _old_yarn_attention(parameters) if old else yarn_attention(parameters)
        if old:
            parameters = {k: v for k, v in parameters.items() if k != "truncate"}
    elif found.kind == "longrope":
        attention = _longrope_attention(parameters, config)
    return rope_of(parameters, config, original, attention)


def _old_yarn_attention(parameters: Mapping[str, Any]) -> float:
    """Without mscale, and without a guard for factors below 1."""
    given = parameters.get("attention_factor")
    return float(given) if given is not None else 0.1 * math.log(parameters["factor"]) + 1.0


def _longrope_attention(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """The native length counts at the top level only."""
    length, top = config["max_position_embeddings"], config.get("original_max_position_embeddings")
    if top:
        return longrope_attention(parameters, length / top, top)
    if parameters.get("attention_factor") is None:
        need(parameters, "factor")
    return longrope_attention(parameters, parameters.get("factor", 1.0), length)
