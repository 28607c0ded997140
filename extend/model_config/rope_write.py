"""A RoPE into `config.json`, so that every program reads the same one.

transformers 4 knows nothing of `rope_parameters` and silently takes theta 10000 from a file that
has nothing else; llama.cpp finds the native length at the top level only, and takes 8192 otherwise.
So all spellings are written.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extend.errors import CompatibilityError
from extend.model_config.families import (
    FLAT_SPELLINGS,
    FULL,
    NEEDS_HEAD_DIM,
    SLIDING,
    THREE_ENTRIES,
    WANTS_MSCALES,
    FlatSpelling,
    check_type,
)
from extend.model_config.rope_read import (
    NATIVE_KEY,
    PARTIAL_KEYS,
    THETA_KEYS,
    entries_by_layer_type,
    head_dim_of,
    is_nested,
    read_partial,
    read_rope,
)
from extend.model_config.rope_spec import RopeSpec, longrope_mscale

STALE_LENGTH_KEYS = ("seq_length", "max_seq_len", "model_max_length", "max_sequence_length",
                     "max_seq_length", "seq_len", "n_positions")
_PATH = Path("config.json")  # for messages; what is written was read before


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
    family = str(raw.get("model_type"))
    _check_rope(family, rope, max_len)
    entries = entries_by_layer_type(raw, _PATH)
    inner = _entry(raw, rope, entries.pop(FULL), family)
    config = {k: v for k, v in raw.items()
              if k not in (*STALE_LENGTH_KEYS, *THETA_KEYS, NATIVE_KEY, "rope_scaling")}
    if rope.rope_type == "proportional":  # its share of pairs must not be taken for one of channels
        config = {k: v for k, v in config.items() if k not in PARTIAL_KEYS}
    if is_nested(raw) or family in FLAT_SPELLINGS:
        _check_nested(rope)
        config |= _nested_keys(raw, inner, entries, FLAT_SPELLINGS.get(family), family)
    else:
        config |= {"rope_theta": rope.rope_theta, "rope_parameters": inner,
                   "rope_scaling": _flat_scaling(family, rope, inner, max_len)}
        if "partial_rotary_factor" in inner and rope.rope_type != "proportional":
            config["partial_rotary_factor"] = inner["partial_rotary_factor"]
    if rope.scaling:
        # For linear, which has no such entry, it is the only record of the native length.
        config[NATIVE_KEY] = rope.original_len
        if raw.get("head_dim") is None and ("head_dim" in raw or family in NEEDS_HEAD_DIM):
            config["head_dim"] = head_dim_of(raw)  # transformers 5 computes with the null
    config["max_position_embeddings"] = max_len
    return config


def _check_rope(family: str, rope: RopeSpec, max_len: int) -> None:
    check_type(family, rope.rope_type)
    if rope.rope_type == "dynamic" and max_len != rope.original_len:
        raise CompatibilityError(
            f"dynamic RoPE counts from max_position_embeddings, which is {rope.original_len} and "
            f"would become {max_len}, under other frequencies; rescale the model with another "
            "method first")


def _entry(raw: Mapping[str, Any], rope: RopeSpec, before: Mapping[str, Any],
           family: str) -> dict[str, Any]:
    """The `rope_parameters` of the layers with full attention; `before` is what they were."""
    inner = {"rope_theta": rope.rope_theta, **(rope.scaling or {"rope_type": "default"})}
    if family in WANTS_MSCALES and rope.scaling:
        attention_factor = inner.get("attention_factor", 1.0)
        inner = {"short_mscale": attention_factor, "long_mscale": attention_factor, **inner}
    if before.get("rope_type") == "proportional":  # its share is not one of channels
        return inner
    share = read_partial(raw, before.get("partial_rotary_factor"), _PATH)
    if rope.rope_type != "proportional":
        return inner if share == 1 else {**inner, "partial_rotary_factor": share}
    if share != 1:
        raise CompatibilityError(
            f"the model rotates {share} of each head, but rope_type proportional chooses its pairs "
            f"({rope.scaling['partial_rotary_factor']} of them) from whole heads; choose another "
            "method")
    return inner


def _flat_scaling(family: str, rope: RopeSpec, inner: Mapping[str, Any],
                  max_len: int) -> dict[str, Any] | None:
    """What transformers 4 reads beside `rope_theta`."""
    if not rope.scaling:
        return None
    usual = longrope_mscale(max_len / rope.original_len, rope.original_len)
    attention = rope.scaling.get("attention_factor", usual)
    if family in THREE_ENTRIES and math.isclose(attention, usual, rel_tol=1e-9):
        # Every reader takes the rest from the lengths at the top level.
        return {"type": "longrope", "short_factor": rope.scaling["short_factor"],
                "long_factor": rope.scaling["long_factor"]}
    return dict(inner)


def _nested_keys(raw: Mapping[str, Any], inner: dict[str, Any], others: dict[str, dict[str, Any]],
                 spelling: FlatSpelling | None, family: str) -> dict[str, Any]:
    parameters = {kind: {"rope_type": "default", **entry} for kind, entry in others.items()}
    parameters[FULL] = inner
    if spelling is None:
        # No reader knows these families by other keys, and some lose all RoPE to a null.
        return {"rope_parameters": parameters}
    theta = inner["rope_theta"]
    local = read_rope(raw, head_dim_of(raw), _PATH)[1][SLIDING].rope_theta
    if spelling.local_key == "rope_theta" and theta != local:
        raise CompatibilityError(
            f"model_type {family!r}: transformers 4 has one theta for sliding and full attention, "
            f"so {theta} for the latter and {local} for the former cannot be written for all "
            "readers; choose a method that keeps theta, such as ntk-by-parts or yarn")
    parameters[SLIDING]["rope_theta"] = local
    flat = {key: value for key, value in inner.items() if key != "rope_theta"}
    return {"rope_parameters": parameters, "rope_theta": theta, spelling.local_key: local,
            "rope_scaling": flat if inner["rope_type"] != "default" else None}


def _check_nested(rope: RopeSpec) -> None:
    """What transformers does not compute where RoPE is nested by layer type."""
    if rope.scaling.get("truncate") is False:
        raise CompatibilityError("RoPE of this model differs by layer type, and there transformers "
                                 "does not read truncate: false; leave truncate out")
    if rope.rope_type == "longrope" and rope.depends_on_length:
        raise CompatibilityError("RoPE of this model differs by layer type, and there transformers "
                                 "5.17 fails on a longrope with two lists; give long_factor alone")
