"""What one engine would compute with: the result of a reader."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from extend.doctor.families import head_dim_of
from extend.model_config import RopeSpec
from extend.rope.frequencies import inv_freq

FULL = "full_attention"
_SAME = 1e-9  # relative; readers that agree run the same fp64 formula on the same numbers
_DIGITS = 12  # of each frequency in the hash
# What the frequencies of a rope_type depend on, beside theta.
_USED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("short_factor", "long_factor"),
    "proportional": ("factor", "partial_rotary_factor"),
}


class ModelFiles(NamedTuple):
    """The three files that decide how a checkpoint is read; {} for one that is absent."""

    config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]


class Refused(Exception):
    """The engine would not load these files; the message says why."""


class Unknown(Exception):
    """What the engine does with these files is not known to this program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRope:
    """RoPE in the layers of one type.

    Attributes:
        parameters: the values that were used, by their names in `rope_parameters`.
        short: radians per token of each pair in sequences up to the native length.
        long: the same in the longest sequences; equal to `short` unless the engine switches.
        attention_factor: multiplies cos and sin.
    """

    parameters: Mapping[str, Any]
    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float

    @property
    def sha(self) -> str:
        """The first 12 hex digits of a hash of the frequencies; two halves when they switch."""
        short, long = _sha(self.short), _sha(self.long)
        return short[:12] if short == long else f"{short[:6]}/{long[:6]}"

    def same_frequencies(self, other: "LayerRope") -> bool:
        return (_close(self.short, other.short) and _close(self.long, other.long)
                and self.parameters.get("positions") == other.parameters.get("positions"))

    def same_attention(self, other: "LayerRope") -> bool:
        return math.isclose(self.attention_factor, other.attention_factor, rel_tol=_SAME)


def _close(mine: Sequence[float], others: Sequence[float]) -> bool:
    return len(mine) == len(others) and all(
        math.isclose(a, b, rel_tol=_SAME) for a, b in zip(mine, others))


def _sha(values: Sequence[float]) -> str:
    text = ",".join(f"{value:.{_DIGITS}e}" for value in values)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How one engine reads a checkpoint.

    Attributes:
        reader: name in `READERS`.
        layers: by layer type; `full_attention` alone when all layers have the same RoPE. Empty
            when the engine refuses or its rule is not known.
        max_len: tokens it takes for the longest sequence.
        origin: for each parameter and for `max_len`, the key it came from.
        refusal: why the engine would not load it, or "".
        unknown: why this program cannot say, or "".
    """

    reader: str
    layers: Mapping[str, LayerRope] = field(default_factory=dict)
    max_len: int = 0
    origin: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""
    unknown: str = ""

    @property
    def main(self) -> LayerRope:
        return self.layers[FULL]

    def to_json(self) -> dict[str, Any]:
        if self.refusal or self.unknown:
            return {"refuses": self.refusal or None, "unknown": self.unknown or None}
        layers = {name: {"rope_theta": layer.parameters["rope_theta"], "inv_freq_sha": layer.sha,
                         "attention_factor": layer.attention_factor,
                         "rope_type": layer.parameters["rope_type"]}
                  for name, layer in self.layers.items()}
        return {**layers[FULL], "max_len": self.max_len, "origin": dict(self.origin),
                "other_layers": {k: v for k, v in layers.items() if k != FULL}}


def rope_of(parameters: Mapping[str, Any], config: Mapping[str, Any], original_len: int,
            attention_factor: float = 1.0) -> LayerRope:
    """The frequencies of one set of parameters, as every engine computes them from it.

    Args:
        parameters: with `rope_type`, `rope_theta` and `partial_rotary_factor`.
        config: for the size of a head.
        original_len: tokens that llama3 and yarn count turns in.

    Raises:
        Refused: numbers from which no frequencies come (such as a ramp of no width).
    """
    head_dim = head_dim_of(config)
    kind, theta = parameters["rope_type"], float(parameters["rope_theta"])
    share = 1.0 if kind == "proportional" else parameters["partial_rotary_factor"]
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise Refused(f"{rotary_dim} of {head_dim} channels would be rotated, not an even number")
    used = {k: parameters[k] for k in ("rope_type", "rope_theta", *_USED.get(kind, ()))
            if k in parameters} | {"rotary_dim": rotary_dim}
    if kind in ("llama3", "yarn"):
        used["original_max_position_embeddings"] = original_len
    try:
        if kind == "longrope":
            plain = _plain(theta, rotary_dim)
            short, long = (_divide(plain, parameters, key) for key in
                           ("short_factor", "long_factor"))
        elif kind == "proportional":
            short = long = _proportional(parameters, theta, head_dim)
        else:
            scaling = {k: v for k, v in parameters.items() if v is not None}
            spec = RopeSpec(rope_theta=theta, rotary_dim=rotary_dim, original_len=original_len,
                            scaling={} if kind == "default" else scaling)
            short = long = tuple(inv_freq(spec).tolist())
    except (ArithmeticError, ValueError) as error:
        raise Refused(f"its numbers give no frequencies ({error})") from None
    return LayerRope(parameters=used, short=short, long=long, attention_factor=attention_factor)


def _plain(theta: float, rotary_dim: int) -> tuple[float, ...]:
    return tuple(theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))


def _divide(plain: Sequence[float], parameters: Mapping[str, Any], key: str) -> tuple[float, ...]:
    factors = parameters[key]
    if len(factors) != len(plain):
        raise Refused(f"{key} has {len(factors)} numbers for {len(plain)} pairs")
    return tuple(value / factor for value, factor in zip(plain, factors))


def _proportional(parameters: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    rotated = int(parameters["partial_rotary_factor"] * head_dim // 2)
    factor = parameters.get("factor") or 1.0
    turning = tuple(theta ** (-2 * i / head_dim) / factor for i in range(rotated))
    return turning + (0.0,) * (head_dim // 2 - rotated)


def need(parameters: Mapping[str, Any], *keys: str) -> None:
    """Raise Refused when a rope_type lacks a key that the engine requires."""
    missing = [key for key in keys if parameters.get(key) is None]
    if missing:
        raise Refused(f"rope_type {parameters['rope_type']!r} lacks {', '.join(missing)}")
