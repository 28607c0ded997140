"""What determines a rotary embedding."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Everything that determines a model's rotary embedding.

    Attributes:
        rope_theta: base of the geometric progression of wavelengths.
        rotary_dim: rotated channels per head (<= head_dim).
        original_len: tokens, the length that `scaling` counts from; where nothing counts from a
            length (plain RoPE, one list of factors for all lengths), the model's own length.
        scaling: the HF `rope_parameters` entries other than `rope_theta`, such as
            `rope_type` and `factor`; empty means plain RoPE.
    """

    rope_theta: float
    rotary_dim: int
    original_len: int
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rope_type(self) -> str:
        return str(self.scaling.get("rope_type", "default"))

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies are chosen by the length of what is read."""
        return depends_on_length(self.scaling)

    def to_json(self) -> dict[str, Any]:
        return {"rope_theta": self.rope_theta, "rotary_dim": self.rotary_dim,
                "original_len": self.original_len, "scaling": dict(self.scaling)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RopeSpec":
        return cls(rope_theta=float(data["rope_theta"]), rotary_dim=int(data["rotary_dim"]),
                   original_len=int(data["original_len"]), scaling=dict(data["scaling"]))


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1, what YaRN multiplies cos and sin by."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_mscale(factor: float, original_len: int) -> float:
    """sqrt(1 + ln(factor) / ln(original_len)), what LongRoPE multiplies cos and sin by."""
    if factor <= 1 or original_len <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_len))


def depends_on_length(entries: Mapping[str, Any]) -> bool:
    """Whether RoPE with these `rope_parameters` turns otherwise in a long row than in a short one.

    Entries that are nested by layer type count when one of them does.
    """
    nested = [entry for entry in entries.values() if isinstance(entry, Mapping)]
    if nested:
        return any(depends_on_length(entry) for entry in nested)
    kind = entries.get("rope_type")
    return kind == "dynamic" or (
        kind == "longrope" and entries.get("short_factor") != entries.get("long_factor"))
