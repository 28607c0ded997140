"""A RoPE into `config.json`, so that every program reads the same one.

transformers 4 knows nothing of `rope_parameters` and silently takes theta 10000 from a file that
has nothing else; llama.cpp finds the native length at the top level only, and takes 8192 otherwise.
So all spellings are written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extend.errors import CompatibilityError
from extend.model_config.families import FLAT_SPELLINGS, FULL, SLIDING, default_partial
from extend.model_config.rope_read import (
    NATIVE_KEY,
    PARTIAL_KEYS,
    THETA_KEYS,
    entries_by_layer_type,
    read_rope,
)
from extend.model_config.rope_spec import RopeSpec

STALE_LENGTH_KEYS = ("seq_length", "max_seq_len", "model_max_length", "max_sequence_length",
                     "max_seq_length", "seq_len", "n_positions")


def write_rope(raw: Mapping[str, Any], rope: RopeSpec, max_len: int) -> dict[str, Any]:
    """Return a copy of `raw` whose RoPE and length keys agree in every spelling.

    Where RoPE differs by layer type, `rope` goes to the layers with full attention, and the others
    keep theirs.

    Args:
        rope: the RoPE to write.
        max_len: tokens, the new `max_position_embeddings`.

    Raises:
        CompatibilityError: a RoPE that this model's readers would not agree on.
    """
    if rope.rope_type == "dynamic" and max_len != rope.original_len:
        raise CompatibilityError(
            f"dynamic RoPE counts from max_position_embeddings, which is {rope.original_len} and "
            f"would become {max_len}, under other frequencies; rescale the model with another "
            "method first")
    config = {k: v for k, v in raw.items() if k not in STALE_LENGTH_KEYS and k not in THETA_KEYS}
    config.pop(NATIVE_KEY, None)
    inner = {"rope_theta": rope.rope_theta, **(rope.scaling or {"rope_type": "default"})}
    others = _other_entries(raw)
    config |= _flat_keys(raw, rope, inner) if others is None else _nested_keys(
        raw, rope, inner, others)
    if rope.scaling:
        # For linear, which has no such entry, it is the only record of the native length.
        config[NATIVE_KEY] = rope.original_len
    config["max_position_embeddings"] = max_len
    return config


def _other_entries(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Entries of the layer types that keep their RoPE; None where all layers share one."""
    entries = entries_by_layer_type(raw, Path("config.json"))
    nested = any(isinstance(value, Mapping) for place in ("rope_parameters", "rope_scaling")
                 for value in (raw.get(place) or {}).values())
    if not nested and raw.get("model_type") not in FLAT_SPELLINGS:
        return None
    return {kind: entry for kind, entry in entries.items() if kind != FULL}


def _flat_keys(raw: Mapping[str, Any], rope: RopeSpec, inner: dict[str, Any]) -> dict[str, Any]:
    partial = _partial(raw, raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {})
    keys: dict[str, Any] = {"rope_theta": rope.rope_theta}
    if rope.rope_type == "proportional":
        _check_whole_heads(partial, rope)
        keys |= {key: rope.scaling["partial_rotary_factor"] for key in PARTIAL_KEYS if key in raw}
    elif partial is not None:
        keys["partial_rotary_factor"] = inner["partial_rotary_factor"] = partial
    return {**keys, "rope_parameters": inner, "rope_scaling": dict(inner) if rope.scaling else None}


def _nested_keys(raw: Mapping[str, Any], rope: RopeSpec, inner: dict[str, Any],
                 others: dict[str, dict[str, Any]]) -> dict[str, Any]:
    _check_nested(rope)
    partial = _partial((raw.get("rope_parameters") or {}).get(FULL) or {}, raw)
    if rope.rope_type == "proportional":
        _check_whole_heads(partial, rope)
    elif partial is not None:
        inner["partial_rotary_factor"] = partial
    parameters = {kind: {"rope_type": "default", **entry} for kind, entry in others.items()}
    parameters[FULL] = inner
    family = str(raw.get("model_type"))
    spelling = FLAT_SPELLINGS.get(family)
    if spelling is None:  # no reader knows such a model by other keys
        return {"rope_parameters": parameters, "rope_scaling": None}
    local = read_rope(raw, _head_dim(raw), Path("config.json"))[1][SLIDING].rope_theta
    if spelling.local_key == "rope_theta" and rope.rope_theta != local:
        raise CompatibilityError(
            f"model_type {family!r}: transformers 4 has one theta for sliding and full attention, "
            f"so {rope.rope_theta} for the latter and {local} for the former cannot be written "
            "for all readers; choose a method that keeps theta, such as ntk-by-parts or yarn")
    parameters[SLIDING]["rope_theta"] = local
    flat = {key: value for key, value in inner.items() if key != "rope_theta"}
    return {"rope_parameters": parameters, "rope_theta": rope.rope_theta,
            spelling.local_key: local, "rope_scaling": flat if rope.scaling else None}


def _partial(*places: Mapping[str, Any]) -> float | None:
    """The rotated share of each head, as the file or its family has it; None where it is all."""
    found = next((place[key] for place in places for key in PARTIAL_KEYS
                  if place.get(key) is not None), None)
    family = next((place["model_type"] for place in places if "model_type" in place), "")
    default = default_partial(str(family))
    return found if found is not None or default == 1 else default


def _check_whole_heads(partial: float | None, rope: RopeSpec) -> None:
    given = rope.scaling.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0, given):
        raise CompatibilityError(
            f"the model rotates {partial} of each head, but rope_type proportional chooses its "
            f"pairs ({given} of them) from whole heads; choose another method")


def _check_nested(rope: RopeSpec) -> None:
    """What transformers does not compute where RoPE is nested by layer type."""
    if rope.scaling.get("truncate") is False:
        raise CompatibilityError("RoPE of this model differs by layer type, and there transformers "
                                 "does not read truncate: false; leave truncate out")
    if rope.rope_type == "longrope" and rope.depends_on_length:
        raise CompatibilityError("RoPE of this model differs by layer type, and there transformers "
                                 "5.17 fails on a longrope with two lists; give long_factor alone")


def _head_dim(raw: Mapping[str, Any]) -> int:
    return int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])
