"""RoPE keys of a `config.json`, in every spelling.

Readers disagree on where RoPE lives: transformers 4 reads `rope_theta` and `rope_scaling`,
transformers 5 `rope_parameters`, some families have names of their own. Where a file says the same
thing twice and differently, some program would read the other value, so that is an error here.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extend.errors import CompatibilityError
from extend.model_config.families import (
    FLAT_SPELLINGS,
    FULL,
    SLIDING,
    check_family,
    default_partial,
    default_theta,
)
from extend.model_config.rope_spec import RopeSpec

THETA_KEYS = ("rope_theta", "rotary_emb_base", "rope_base")
PARTIAL_KEYS = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_emb_fraction")
NATIVE_KEY = "original_max_position_embeddings"
SCALED_TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
NATIVE_KEY_TYPES = ("yarn", "llama3", "longrope")
"""Types whose entries name the native length."""
_ALIASES = {"su": "longrope", "": "default"}
# What every reader ignores when rope_type is default.
_IDLE_KEYS = frozenset({
    NATIVE_KEY, "factor", "attention_factor", "beta_fast", "beta_slow", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate"})
_PLACES = ("rope_parameters", "rope_scaling")


def read_rope(raw: Mapping[str, Any], head_dim: int,
              path: Path) -> tuple[RopeSpec, dict[str, RopeSpec]]:
    """The RoPE of the full-attention layers, and that of every other type of layer that has one.

    Args:
        raw: the keys of config.json.
        head_dim: channels of a head.
        path: for messages.

    Raises:
        CompatibilityError: contradictory keys (both values are shown), an entry that is missing or
            out of range, or RoPE of a kind that is not supported.
    """
    entries = entries_by_layer_type(raw, path)
    specs = {kind: _read_spec(raw, kind, entry, head_dim, path) for kind, entry in entries.items()}
    return specs.pop(FULL), specs


def head_dim_of(raw: Mapping[str, Any]) -> int:
    """Channels of a head."""
    given = next((raw[key] for key in ("head_dim", "attention_head_dim", "kv_channels")
                  if raw.get(key)), None)
    return int(given or int(raw["hidden_size"]) // int(raw["num_attention_heads"]))


def is_nested(raw: Mapping[str, Any]) -> bool:
    """Whether RoPE entries are nested by layer type."""
    return any(isinstance(value, Mapping) for place in _PLACES
               for value in (raw.get(place) or {}).values())


def entries_by_layer_type(raw: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """RoPE entries for each type of layer; one item, `FULL`, where all layers are alike.

    Aliases of rope types are resolved and keys that are null left out.

    Raises:
        CompatibilityError: as `read_rope`.
    """
    nested, flat = _split(raw, path)
    check_family(raw, nested, path)
    flat_spelling = FLAT_SPELLINGS.get(str(raw.get("model_type")))
    if nested is None and flat_spelling is None:
        return {FULL: flat}
    if nested is None and raw.get("rope_parameters"):
        raise CompatibilityError(f"{path}: RoPE of model_type {raw['model_type']!r} differs by "
                                 f"layer type, but rope_parameters is not nested by {FULL} and "
                                 f"{SLIDING}; nest it")
    found = {kind: _normalized(entry, f"rope_parameters.{kind}", path)
             for kind, entry in (nested or {}).items() if entry is not None}
    found[FULL] = _united({f"in rope_parameters.{FULL}": found.get(FULL, {}),
                           "in rope_scaling": flat}, path)
    if flat_spelling is not None:
        found.setdefault(SLIDING, {})
    return found


def _split(raw: Mapping[str, Any],
           path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Entries nested by layer type (None where there are none), and flat ones."""
    nested: dict[str, Any] = {}
    flat: dict[str, Mapping[str, Any]] = {}
    for place in _PLACES:
        entries = raw.get(place) or {}
        if not isinstance(entries, Mapping):
            raise TypeError(f"{place} is {entries!r}")
        if not any(isinstance(value, Mapping) for value in entries.values()):
            flat[f"in {place}"] = _normalized(entries, place, path)
            continue
        stray = [k for k, v in entries.items() if v is not None and not isinstance(v, Mapping)]
        if stray:
            raise CompatibilityError(f"{path}: {place} holds {', '.join(stray)} beside entries "
                                     "nested by layer type, which only some readers apply; put "
                                     "them into each entry")
        if nested and nested != entries:
            raise CompatibilityError(f"{path}: rope_parameters and rope_scaling are both nested "
                                     f"by layer type and differ: {nested} and {dict(entries)}; "
                                     "keep one")
        nested = dict(entries)
    return nested or None, _united(flat, path)


def _normalized(entries: Mapping[str, Any], place: str, path: Path) -> dict[str, Any]:
    """The entries without nulls, and with one name for the type."""
    found = {key: value for key, value in entries.items() if value is not None}
    names = {key: _ALIASES.get(str(found.pop(key)), str(entries[key]))
             for key in ("rope_type", "type") if key in found}
    if "long_factor" in found:  # the first Phi-3 called it yarn
        names = {key: "longrope" if name == "yarn" else name for key, name in names.items()}
    kind = agreed("rope_type", {f"in {place}" if key == "rope_type" else f"in {place} (type)": name
                                for key, name in names.items()}, path)
    return found if kind is None else {"rope_type": kind, **found}


def _united(places: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Any]:
    """Entries of several places as one dict."""
    keys = dict.fromkeys(key for entries in places.values() for key in entries)
    return {key: agreed(key, {place: entries.get(key) for place, entries in places.items()}, path)
            for key in keys}


def agreed(key: str, values: Mapping[str, Any], path: Path) -> Any:
    """The one value of `key`, given by place; None where no place has it.

    Raises:
        CompatibilityError: two places differ.
    """
    found = [(place, value) for place, value in values.items() if value is not None]
    for place, value in found[1:]:
        if value != found[0][1]:
            raise CompatibilityError(
                f"{path}: {key} is {found[0][1]} {found[0][0]} but {value} {place}, so loaders "
                "disagree; put the right value in both")
    return found[0][1] if found else None


def _read_spec(raw: Mapping[str, Any], layer_type: str, entry: Mapping[str, Any], head_dim: int,
               path: Path) -> RopeSpec:
    entry = dict(entry)
    kind = entry.pop("rope_type", "default")
    if kind != "default" and kind not in SCALED_TYPES:
        raise CompatibilityError(f"{path}: rope_type {kind!r} is not supported; known are default, "
                                 f"{', '.join(SCALED_TYPES)}")
    theta = _theta(raw, layer_type, entry.pop("rope_theta", None), path)
    partial = read_partial(raw, entry.pop("partial_rotary_factor", None), path)
    rotary_dim = int(raw.get("qk_rope_head_dim") or int(head_dim * partial))
    native = int(raw["max_position_embeddings"])
    if kind == "default":
        _check_idle(entry, path)
        return RopeSpec(rope_theta=theta, rotary_dim=rotary_dim, original_len=native)
    if kind == "proportional":  # a share of the pairs turns, the others stand still
        entry["partial_rotary_factor"] = partial
        rotary_dim = int(raw.get("qk_rope_head_dim") or head_dim)
    if kind != "dynamic":  # that counts from max_position_embeddings whatever else there is
        native = int(agreed(NATIVE_KEY, {"at the top": raw.get(NATIVE_KEY),
                                         "in its RoPE entries": entry.get(NATIVE_KEY)},
                            path) or native)
    if kind in NATIVE_KEY_TYPES:
        entry[NATIVE_KEY] = native
    if kind in ("yarn", "longrope"):
        entry.setdefault("factor", raw["max_position_embeddings"] / native)
    _check_numbers(entry, rotary_dim // 2, path)
    return RopeSpec(rope_theta=theta, rotary_dim=rotary_dim, original_len=native,
                    scaling={"rope_type": kind, **entry})


def _theta(raw: Mapping[str, Any], layer_type: str, inner: Any, path: Path) -> float:
    family = str(raw.get("model_type"))
    spelling = FLAT_SPELLINGS.get(family)
    keys, default = THETA_KEYS, default_theta(family)
    if spelling is not None:
        keys, default = ("rope_theta",), spelling.theta
    if layer_type != FULL:
        keys, default = ((spelling.local_key,), spelling.local_theta) if spelling else ((), default)
    places = {_at_top(key, "rope_theta"): None if raw.get(key) is None else float(raw[key])
              for key in keys}
    places[f"in rope_parameters{'' if layer_type == FULL else '.' + layer_type}"] = (
        None if inner is None else float(inner))
    found = agreed("rope_theta", places, path)
    theta = default if found is None else found
    if not 1 < theta < math.inf:
        raise CompatibilityError(f"{path}: rope_theta is {theta}; it must be a finite number above "
                                 "1")
    return theta


def read_partial(raw: Mapping[str, Any], inner: Any, path: Path) -> float:
    """The rotated share of each head; `inner` is what the RoPE entries say, or None."""
    places = {_at_top(key, "partial_rotary_factor"): None if raw.get(key) is None
              else float(raw[key]) for key in PARTIAL_KEYS}
    if raw.get("rotary_dim") is not None:
        places["at the top (rotary_dim / head_dim)"] = raw["rotary_dim"] / head_dim_of(raw)
    if inner is not None:
        # In nested entries a layer type may have another share than the rest of the model.
        places = {} if is_nested(raw) else places
        places["in rope_parameters"] = float(inner)
    found = agreed("partial_rotary_factor", places, path)
    partial = default_partial(str(raw.get("model_type"))) if found is None else found
    if not 0 < partial <= 1:
        raise CompatibilityError(f"{path}: partial_rotary_factor is {partial}; it must be above 0 "
                                 "and at most 1")
    return partial


def _at_top(key: str, name: str) -> str:
    return "at the top" if key == name else f"at the top ({key})"


def _check_idle(entry: Mapping[str, Any], path: Path) -> None:
    """Refuse entries of plain RoPE that would be lost, as multimodal sections are."""
    unknown = sorted(set(entry) - _IDLE_KEYS)
    if unknown:
        raise CompatibilityError(f"{path}: {', '.join(unknown)} in rope_parameters is not known "
                                 "for rope_type default; such models are not supported")


def _check_numbers(entry: Mapping[str, Any], pairs: int, path: Path) -> None:
    factor = entry.get("factor")
    if factor is not None and not float(factor) >= 1:
        raise CompatibilityError(f"{path}: factor is {factor} in its RoPE entries; a context is "
                                 "stretched by 1 or more")
    for name in ("short_factor", "long_factor"):
        values = entry.get(name)
        if values is not None and len(values) != pairs:
            raise CompatibilityError(f"{path}: {name} has {len(values)} entries but the model has "
                                     f"{pairs} rotated pairs; the two are not of one model")
