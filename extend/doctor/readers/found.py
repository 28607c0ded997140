"""RoPE keys as a configuration class leaves them, before an engine uses them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from extend.doctor.reading import FULL, LayerRope, need, rope_of
from extend.model_config import longrope_mscale, yarn_mscale

COUNTS_FROM_NATIVE = ("llama3", "yarn", "longrope")
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# The pairs of an old and a new name that mean the same.
_SAME_TYPE = {("su", "longrope"), ("mrope", "default")}


class Found(NamedTuple):
    """`rope_parameters` of one layer type, complete, and the key that each value came from.

    `parameters` holds rope_type, rope_theta and partial_rotary_factor in every case.
    """

    parameters: dict[str, Any]
    origin: dict[str, str]

    @property
    def kind(self) -> str:
        return str(self.parameters["rope_type"])

    def original_len(self, default: int) -> int:
        return int(self.parameters.get("original_max_position_embeddings") or default)


def first(places: Sequence[tuple[str, Any]], default: Any, why: str) -> tuple[Any, str]:
    """The first value that is not None, with the name of its place.

    Args:
        places: name and value, in the order of precedence.
        default: when all are None.
        why: what to call the default.
    """
    for name, value in places:
        if value is not None:
            return value, name
    return default, why


def complete(entries: Mapping[str, Any], place: str, rope_type: str,
             **values: tuple[Any, str]) -> Found:
    """Put the entries of a config together with the values that were looked up for it.

    Args:
        entries: of `rope_scaling` or `rope_parameters`.
        place: the name of that key.
        rope_type: as the class resolves it.
        values: (value, origin) by parameter name.
    """
    parameters = {k: v for k, v in entries.items()
                  if k != "type" and v is not None and not isinstance(v, Mapping)}
    origin = dict.fromkeys(parameters, place)
    parameters["rope_type"], origin["rope_type"] = rope_type, place if entries else "no scaling key"
    for name, (value, source) in values.items():
        parameters[name], origin[name] = value, source
    return Found(parameters, origin)


def origins(found: Mapping[str, Found], max_len: str) -> dict[str, str]:
    """Where each value came from; those of other layer types than full attention by `type.key`."""
    others = {f"{name}.{key}": place for name, entry in found.items() if name != FULL
              for key, place in entry.origin.items()}
    return {**others, **found[FULL].origin, "max_len": max_len}


def check_required(found: Found) -> None:
    """Raise Refused when a key that every version of transformers demands is missing."""
    need(found.parameters, *_REQUIRED.get(found.kind, ()))


def conflicting_types(entries: Mapping[str, Any]) -> bool:
    """Whether `type` and `rope_type` stand side by side and mean different things."""
    old, new = entries.get("type"), entries.get("rope_type")
    return None not in (old, new) and old != new and (old, new) not in _SAME_TYPE


def yarn_attention(parameters: Mapping[str, Any]) -> float:
    """The attention factor of YaRN in transformers from 4.57 on."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor, mscale = parameters["factor"], parameters.get("mscale")
    over_all = parameters.get("mscale_all_dim")
    if mscale and over_all:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, over_all)
    return yarn_mscale(factor)


def longrope_attention(parameters: Mapping[str, Any], factor: float, original: int) -> float:
    """The attention factor of LongRoPE in transformers."""
    given = parameters.get("attention_factor")
    return float(given) if given is not None else longrope_mscale(factor, original)


def dynamic_by_length(found: Found, config: Mapping[str, Any]) -> LayerRope:
    """transformers' dynamic NTK: plain up to max_position_embeddings, then a theta that grows.

    `long` holds the frequencies at factor x max_position_embeddings, where the engines that fix
    one theta fix it.
    """
    short = rope_of({**found.parameters, "rope_type": "default"}, config, 1)
    long = dynamic_at_once(found, config)
    return LayerRope(parameters=long.parameters, short=short.short, long=long.long,
                     attention_factor=1.0)


def dynamic_at_once(found: Found, config: Mapping[str, Any]) -> LayerRope:
    """The dynamic NTK of vLLM and SGLang: the theta for factor x the length, at every length.

    theta' = theta * (f * f - (f - 1))^(d / (d - 2)).
    """
    plain = rope_of({**found.parameters, "rope_type": "default"}, config, 1)
    dim, factor = plain.parameters["rotary_dim"], found.parameters["factor"]
    growth = (factor * factor - (factor - 1)) ** (dim / (dim - 2)) if dim > 2 else 1.0
    theta = found.parameters["rope_theta"] * growth
    fixed = rope_of({**found.parameters, "rope_type": "default", "rope_theta": theta}, config, 1)
    used = {k: found.parameters[k] for k in ("rope_type", "rope_theta", "factor")}
    return LayerRope(parameters={**used, "rotary_dim": dim}, short=fixed.short, long=fixed.long,
                     attention_factor=1.0)
