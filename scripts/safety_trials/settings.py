"""The RoPE settings under trial, and the fine-tunes that they are tried on."""

from dataclasses import dataclass, field
from typing import Any

from extend.model_config import RopeSpec
from extend.rope.frequencies import inv_freq, turns
from extend.rope.methods import apply_method

FACTORS = (4, 16, 128)
THETA_MULTIPLES = {4: 4, 16: 20, 128: 160}  # the theta asked for at each factor
RAMPS = ((1, 4), (0.5, 2), (1, 32))  # turns in the native length
PARTS = ((32, None), (4, 32), (None, 4))  # turns of the pairs that the partial NTKs move
NATIVE = "native"


@dataclass(frozen=True)
class Setting:
    """One RoPE to put under a model.

    Attributes:
        name: label, unique.
        kind: label without the factor.
        factor: target length over native length; 1 for the model's own RoPE.
        family: every-pair (theta, NTK, linear), by-parts, yarn, part (a piece of NTK) or native.
        method, options: as `apply_method` takes them.
        spec: the RoPE.
    """

    name: str
    kind: str
    factor: int
    family: str
    method: str | None
    options: dict[str, Any]
    spec: RopeSpec = field(repr=False)

    def record(self) -> dict[str, Any]:
        """JSON values that say what it is."""
        return {"name": self.name, "kind": self.kind, "factor": self.factor,
                "family": self.family, "method": self.method, "options": self.options}


def make_settings(native: RopeSpec, factors: tuple[int, ...] = FACTORS) -> list[Setting]:
    """The native RoPE, then every method at every factor, then NTK on some pairs only."""
    settings = [Setting(NATIVE, NATIVE, 1, NATIVE, None, {}, native)]
    for factor in factors:
        settings += [_apply(native, factor, *row) for row in _methods(native, factor)]
        if factor == 16:
            settings += [_apply(native, factor, *row) for row in _parts(native, factor)]
    return settings


def _apply(native: RopeSpec, factor: int, kind: str, family: str, method: str,
           options: dict[str, Any]) -> Setting:
    spec = apply_method(method, native, factor * native.original_len, options)
    return Setting(f"{kind} x{factor}", kind, factor, family, method, options, spec)


def _methods(native: RopeSpec, factor: int) -> list[tuple[str, str, str, dict[str, Any]]]:
    theta = native.rope_theta * THETA_MULTIPLES.get(factor, factor)
    ramps = [(f"by-parts {low:g}-{high:g}", "by-parts", "ntk-by-parts",
              {"low_freq_factor": low, "high_freq_factor": high}) for low, high in RAMPS]
    return [("theta", "every-pair", "theta", {"rope_theta": theta}),
            ("ntk", "every-pair", "ntk", {}), ("critical", "every-pair", "critical", {}),
            ("linear", "every-pair", "linear", {}), *ramps, ("yarn", "yarn", "yarn", {}),
            ("yarn, no attention factor", "yarn", "yarn", {"attention_factor": 1.0})]


def _parts(native: RopeSpec, factor: int) -> list[tuple[str, str, str, dict[str, Any]]]:
    """NTK's change, but only of pairs that turn so often in the native length."""
    ntk = apply_method("ntk", native, factor * native.original_len, {})
    ratios, count, rows = inv_freq(native) / inv_freq(ntk), turns(native), []
    for low, high in PARTS:
        moved = (count > (low or 0)) & (count <= (high or float("inf")))
        ratio = ratios.where(moved, ratios.new_ones(()))
        label = f"> {low}" if high is None else f"<= {high}" if low is None else f"{low}-{high}"
        rows.append((f"ntk, turns {label}", "part", "longrope",
                     {"long_factor": ratio.tolist()}))
    return rows


@dataclass(frozen=True)
class Strength:
    """How long and how hard a sibling is fine-tuned, and which weights change."""

    name: str
    steps: int
    lr: float
    part: str = "all"


STRENGTHS = {
    "smollm2": (Strength("mild", 150, 5e-5), Strength("medium", 200, 2e-4),
                Strength("strong", 400, 5e-4), Strength("medium, MLPs", 200, 2e-4, "mlp")),
    "tiny": (Strength("mild", 200, 1e-3), Strength("medium", 200, 2e-3),
             Strength("strong", 300, 3e-3), Strength("medium, MLPs", 200, 3e-3, "mlp")),
}
"""level -> fine-tunes of each skill, from the smallest drift to the largest."""
