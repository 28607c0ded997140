"""Which values are right: where all places that name one agree, or where the user says so."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from extend.doctor.families import GEMMA3, head_dim_of, partial_default, theta_default
from extend.doctor.length import length_question
from extend.doctor.readers.found import conflicting_types, longrope_attention, yarn_attention
from extend.doctor.reading import FULL, ModelFiles
from extend.model_config import RopeSpec, depends_on_length, longrope_mscale
from extend.rope.factors import longrope_attention_keys, yarn_attention_keys

_ORIGINAL = "original_max_position_embeddings"
_COUNTS_FROM_NATIVE = ("llama3", "yarn", "longrope")
_NAMES = {"su": "longrope"}
_NOT_SCALING = ("type", "rope_type", "rope_theta", "partial_rotary_factor")


class Choices(NamedTuple):
    """What the user says where the files contradict themselves; None: nothing said."""

    theta: float | None = None
    max_length: int | None = None
    original_length: int | None = None
    rope_type: str | None = None
    keep: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The RoPE and length that are meant.

    Attributes:
        spec: of the full-attention layers; with `questions`, the best guess.
        max_len: tokens.
        partial_rotary_factor: rotated share of a head.
        questions: what only the user can say, each with the option that says it.
    """

    spec: RopeSpec
    max_len: int
    partial_rotary_factor: float
    questions: tuple[str, ...] = ()


def decide(files: ModelFiles, choices: Choices, name_hint: str = "") -> Decision:
    """Collect every place that names a value, and ask where they differ.

    Args:
        files: of the checkpoint.
        choices: the user's answers.
        name_hint: the directory's name, which may hold a length.
    """
    config = files.config
    length = choices.max_length or config["max_position_embeddings"]
    entries, about_entries = _entries(config, choices)
    kind, about_kind = _kind(entries, choices)
    theta, about_theta = _theta(config, choices)
    original, about_original = _original(config, entries, kind, choices, length)
    share, about_share = _share(config, entries)
    questions = [*about_entries, *about_kind, *about_theta, *about_original, *about_share]
    scaling = _scaling(config, entries, kind, original, length)
    rotated = share
    if kind == "proportional":  # a share of the pairs of whole heads
        scaling, rotated = {**scaling, "partial_rotary_factor": share}, 1.0
    spec = RopeSpec(rope_theta=theta, rotary_dim=int(head_dim_of(config) * rotated),
                    original_len=scaling.get(_ORIGINAL, original), scaling=scaling)
    if choices.max_length is None:
        questions += length_question(files, spec, name_hint)
    if config.get("dual_chunk_attention_config"):
        questions.append("dual_chunk_attention_config makes vLLM and SGLang count positions "
                         "within chunks; the other engines do not read it: take it out by hand, "
                         "or serve the model with vLLM or SGLang only")
    return Decision(spec=spec, max_len=length, partial_rotary_factor=share,
                    questions=tuple(questions))


def _entries(config: Mapping[str, Any], choices: Choices) -> tuple[dict[str, Any], list[str]]:
    """The scaling entries that are meant: of `rope_scaling` or of `rope_parameters`."""
    scaling = dict(config.get("rope_scaling") or {})
    parameters = dict(config.get("rope_parameters") or {})
    if FULL in parameters or config.get("model_type") == GEMMA3:
        parameters = dict(parameters.get(FULL) or {})
    if choices.keep is not None:
        return (scaling if choices.keep == "rope_scaling" else parameters), []
    one, other = _meaning(scaling), _meaning(parameters)
    if scaling and parameters and any(one[key] != other[key] for key in one if key in other):
        return scaling, [f"rope_scaling is {_brief(scaling)} but rope_parameters is "
                         f"{_brief(parameters)}: give --keep rope_scaling or --keep "
                         "rope_parameters"]
    return {**parameters, **scaling}, []


def _meaning(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What two spellings must share: everything but theta, which is looked at by itself."""
    kind = _NAMES.get(_type_of(entries), _type_of(entries))
    rest = {k: v for k, v in entries.items() if k not in _NOT_SCALING and v is not None}
    return {"rope_type": kind, **(rest if kind != "default" else {})}


def _type_of(entries: Mapping[str, Any]) -> str:
    return str(entries.get("rope_type") or entries.get("type") or "default")


def _brief(entries: Mapping[str, Any]) -> str:
    rest = [f"{k} {v}" for k, v in _meaning(entries).items()
            if k != "rope_type" and not isinstance(v, list)]
    return " ".join([_type_of(entries), *rest])


def _kind(entries: Mapping[str, Any], choices: Choices) -> tuple[str, list[str]]:
    if choices.rope_type is not None:
        return choices.rope_type, []
    if conflicting_types(entries):
        return _type_of(entries), [
            f"rope_type is {entries['rope_type']!r} (read by transformers 5) but type is "
            f"{entries['type']!r} (read by transformers 4): give --rope-type"]
    return _NAMES.get(_type_of(entries), _type_of(entries)), []


def _theta(config: Mapping[str, Any], choices: Choices) -> tuple[float, list[str]]:
    if choices.theta is not None:
        return choices.theta, []
    parameters = config.get("rope_parameters") or {}
    nested = parameters.get(FULL) or {}
    places = {key: config.get(key) for key in ("rope_theta", "rotary_emb_base", "rope_base")}
    places["rope_scaling.rope_theta"] = (config.get("rope_scaling") or {}).get("rope_theta")
    places["rope_parameters.rope_theta"] = parameters.get("rope_theta")
    places[f"rope_parameters.{FULL}.rope_theta"] = nested.get("rope_theta")
    if config.get("model_type") == GEMMA3 and nested:
        del places["rope_parameters.rope_theta"]  # counts for nothing beside the nested entries
    return _one("theta", places, theta_default(config), "--theta")


def _one(name: str, places: Mapping[str, float | None], default: float,
         option: str) -> tuple[float, list[str]]:
    """The value that all places share, or the first one and a question."""
    given = {place: value for place, value in places.items() if value is not None}
    if not given:
        return float(default), []
    first = next(iter(given.values()))
    if all(math.isclose(value, first, rel_tol=1e-12) for value in given.values()):
        return float(first), []
    listed = ", ".join(f"{value:.12g} ({place})" for place, value in given.items())
    return float(first), [f"{name} is {listed}: give {option}"]


def _original(config: Mapping[str, Any], entries: Mapping[str, Any], kind: str, choices: Choices,
              length: int) -> tuple[int, list[str]]:
    if choices.original_length is not None:
        return choices.original_length, []
    if kind not in _COUNTS_FROM_NATIVE:
        top = config.get(_ORIGINAL) or entries.get(_ORIGINAL)
        return int(top if top and kind in ("linear", "proportional") else length), []
    places = {f"{_ORIGINAL} at the top level": config.get(_ORIGINAL),
              f"{_ORIGINAL} in the scaling entry": entries.get(_ORIGINAL)}
    value, ask = _one("the native length", places, length, "--original-length")
    if not any(places.values()):
        ask = [f"rope_type {kind} counts from a native length, and no {_ORIGINAL} is there; "
               f"transformers would take max_position_embeddings, {length}: give "
               "--original-length"]
    return int(value), ask


def _share(config: Mapping[str, Any], entries: Mapping[str, Any]) -> tuple[float, list[str]]:
    keys = ("partial_rotary_factor", "rotary_pct")
    places = {key: config.get(key) for key in keys}
    places["partial_rotary_factor in the RoPE entry"] = entries.get("partial_rotary_factor")
    share, ask = _one("the rotated share of a head", places,
                      partial_default(config), "")
    return share, [text.removesuffix(": give ") + ": write one of them by hand" for text in ask]


def _scaling(config: Mapping[str, Any], entries: Mapping[str, Any], kind: str, original: int,
             length: int) -> dict[str, Any]:
    """The scaling entries to write, without theta; {} for plain RoPE."""
    if kind == "default":
        return {}
    kept = {k: v for k, v in entries.items()
            if k not in _NOT_SCALING and v is not None and not isinstance(v, Mapping)}
    return _portable({"rope_type": kind, **kept}, original, length,
                     phi3=config.get("model_type") == "phi3")


def _portable(scaling: dict[str, Any], original: int, length: int, *,
              phi3: bool) -> dict[str, Any]:
    """The same RoPE with the keys that more engines read.

    Engines take a YaRN attention factor from `attention_factor` (transformers, new vLLM) or as a
    multiplier from `attn_factor` (old vLLM, SGLang), and one of LongRoPE from `attention_factor`
    (transformers) or `short_mscale` and `long_mscale` (vLLM, SGLang).
    """
    kind = scaling["rope_type"]
    if kind in _COUNTS_FROM_NATIVE:
        scaling[_ORIGINAL] = original
    if kind == "yarn":
        return _portable_yarn(scaling, original, length)
    if kind == "longrope":
        return _portable_longrope(scaling, original, length, keep_native=phi3)
    return scaling


def _portable_longrope(scaling: dict[str, Any], original: int, length: int, *,
                       keep_native: bool) -> dict[str, Any]:
    """One list needs no native length, and without one vLLM and SGLang add no factor of theirs.

    Phi-3 keeps it where its attention factor comes from it, because its class in transformers 4
    takes no entry for the factor.
    """
    factor = scaling.get("factor") or length / original
    attention, usual = longrope_attention(scaling, factor, original), longrope_mscale(
        length / original, original)
    rest = {k: v for k, v in scaling.items() if k not in ("short_mscale", "long_mscale")}
    keep_native &= math.isclose(attention, usual)
    if depends_on_length(scaling) or keep_native:
        return {**rest, "factor": factor, **longrope_attention_keys(attention, usual)}
    return {**rest, "factor": 1.0, _ORIGINAL: length, **longrope_attention_keys(attention, 1.0)}


def _portable_yarn(scaling: dict[str, Any], original: int, length: int) -> dict[str, Any]:
    factor = scaling.setdefault("factor", length / original)
    attention = yarn_attention(scaling)
    rest = {k: v for k, v in scaling.items() if k not in
            ("attention_factor", "attn_factor", "mscale", "mscale_all_dim")}
    return {**rest, **yarn_attention_keys(attention, factor)}
