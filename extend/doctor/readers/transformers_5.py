"""transformers 5: `rope_parameters`, and the old keys where it is absent.

Source: huggingface/transformers, modeling_rope_utils.py of 5.23 (RotaryEmbeddingConfigMixin and
the `_compute_*_parameters` functions); the configuration classes of Gemma 3, GPT-NeoX and Phi-3.
"""

from collections.abc import Mapping
from typing import Any

from extend.doctor.families import (
    GEMMA3,
    GEMMA3_LOCAL_THETA,
    GEMMA3_THETA,
    family_of,
    partial_default,
    theta_default,
)
from extend.doctor.readers.found import (
    COUNTS_FROM_NATIVE,
    Found,
    check_required,
    complete,
    dynamic_by_length,
    first,
    longrope_attention,
    origins,
    yarn_attention,
)
from extend.doctor.reading import FULL, LayerRope, ModelFiles, Refused, Unknown, need, rope_of
from extend.model_config.families import NEEDS_HEAD_DIM

_PHI3_ORIGINAL = 4096  # the class's default, which hides an entry inside rope_parameters
_KNOWN = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def read_transformers_5(files: ModelFiles) -> tuple[dict[str, LayerRope], int, dict[str, str]]:
    """As `AutoModelForCausalLM.from_pretrained` of transformers 5 builds it."""
    config = files.config
    found = find(config)
    nested = len(found) > 1
    layers = {name: compute(entry, config, nested=nested) for name, entry in found.items()}
    origin = origins(found, "max_position_embeddings")
    return layers, config["max_position_embeddings"], origin


def find(config: Mapping[str, Any]) -> dict[str, Found]:
    """What the configuration class holds after loading, by layer type.

    Raises:
        Refused: the class raises on a missing key.
        Unknown: layer types without `full_attention`.
    """
    if config.get("model_type") == GEMMA3:
        found = _find_gemma3(config)
    else:
        scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
        place = "rope_scaling" if scaling else "rope_parameters"
        entries = scaling or parameters or {}
        types = [k for k in entries if k in (config.get("layer_types") or ())]
        if types and FULL not in types:
            raise Unknown(f"{place} names layer types but no {FULL}")
        found = {name: _find_one(config, entries[name] or {}, f"{place}.{name}", nested=True)
                 for name in types} or {FULL: _find_one(config, entries, place)}
    for entry in found.values():
        check_required(entry)
        if entry.kind == "longrope":
            _check_head_dim(entry, config)
        if entry.kind in COUNTS_FROM_NATIVE:
            need(entry.parameters, "original_max_position_embeddings")
    return found


def _find_one(config: Mapping[str, Any], entries: Mapping[str, Any], place: str, *,
              nested: bool = False, theta: tuple[Any, str] | None = None) -> Found:
    family = family_of(config)
    rope_type = str(first([("", entries.get("rope_type")), ("", entries.get("type"))],
                          "default", "")[0])
    values = {
        "rope_theta": theta or first([(f"{place}.rope_theta", entries.get("rope_theta")),
                                      (family.theta_key, config.get(family.theta_key))],
                                     theta_default(config), "the default, because it is absent"),
        "partial_rotary_factor": first(
            [(f"{place}.partial_rotary_factor", entries.get("partial_rotary_factor")),
             (family.partial_key, config.get(family.partial_key))],
            partial_default(config), "the default")}
    if rope_type in COUNTS_FROM_NATIVE:
        values["original_max_position_embeddings"] = _original(config, entries, place, nested)
    if rope_type == "yarn" and "factor" in entries and entries["factor"] is None:
        ratio = config["max_position_embeddings"] / values["original_max_position_embeddings"][0]
        values["factor"] = (ratio, "max_position_embeddings / original_max_position_embeddings")
    if config.get("model_type") == "phi3" and rope_type in ("su", "yarn"):
        rope_type = "longrope"  # after the native length was looked up, which su misses
    return complete(entries, place, rope_type, **values)


def _original(config: Mapping[str, Any], entries: Mapping[str, Any], place: str,
              nested: bool) -> tuple[Any, str]:
    key = "original_max_position_embeddings"
    top = config.get(key)
    if top is None and config.get("model_type") == "phi3":
        return _PHI3_ORIGINAL, f"the default of Phi-3, because there is no {key} at the top level"
    inside = (f"{place}.{key}", entries.get(key))
    places = [inside] if nested else [(key, top), inside]
    return first(places, config["max_position_embeddings"], "max_position_embeddings")


def _find_gemma3(config: Mapping[str, Any]) -> dict[str, Found]:
    """Flat entries of `rope_parameters` count for nothing here; `rope_scaling` is merged in."""
    parameters = config.get("rope_parameters") or {}
    found = {}
    for name, key, default in ((FULL, "rope_theta", GEMMA3_THETA),
                               ("sliding_attention", "rope_local_base_freq", GEMMA3_LOCAL_THETA)):
        place = f"rope_parameters.{name}"
        entries = dict(parameters.get(name) or {})
        if name == FULL and config.get("rope_scaling"):
            entries.update(config["rope_scaling"])
            place = f"rope_scaling and {place}"
        theta = first([(f"{place}.rope_theta", entries.get("rope_theta")),
                       (key, config.get(key))], default, "the default, because it is absent")
        found[name] = _find_one(config, entries, place, nested=True, theta=theta)
    return found


def _check_head_dim(found: Found, config: Mapping[str, Any]) -> None:
    """These types multiply `head_dim` without a look whether it is null."""
    if config.get("head_dim") is None and (
            "head_dim" in config or config.get("model_type") in NEEDS_HEAD_DIM):
        raise Refused(f"its rope_type {found.kind} needs head_dim, which is null or absent")


def compute(found: Found, config: Mapping[str, Any], *, nested: bool) -> LayerRope:
    """The frequencies that the model's rotary embedding computes.

    Raises:
        Refused: a rope_type without a function.
    """
    parameters, length = found.parameters, config["max_position_embeddings"]
    if found.kind not in _KNOWN or (config.get("model_type") == "phi3"
                                    and found.kind not in ("default", "longrope")):
        raise Refused(f"rope_type {found.kind!r} is not one it knows for this model")
    if found.kind in ("dynamic", "yarn"):
        _check_head_dim(found, config)
    if found.kind == "dynamic":
        return dynamic_by_length(found, config)
    original = found.original_len(length)
    attention = 1.0
    if found.kind == "yarn":
        attention = yarn_attention(parameters)
        if nested:  # looked for outside the layer's entry
            parameters = {k: v for k, v in parameters.items() if k != "truncate"}
    elif found.kind == "longrope":
        factor = parameters.get("factor") or length / original
        attention = longrope_attention(parameters, factor, original)
    return rope_of(parameters, config, original, attention)
