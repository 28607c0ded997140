"""What is tried: the model as it is, the analytic methods, other thetas, and curves."""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec
from extend.registry import option_names
from extend.rope.frequencies import attention_factor, critical_index, inv_freq
from extend.rope.methods import METHODS, apply_method
from extend.search.curve import Curve

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# Beyond the defaults of every method. The first is the ramp of the YaRN paper; the second one
# touches only what turns at most twice in the native length.
_VARIANTS: tuple[tuple[str, dict[str, float]], ...] = (
    ("ntk-by-parts", {"low_freq_factor": 1.0, "high_freq_factor": 32.0}),
    ("ntk-by-parts", {"low_freq_factor": 0.5, "high_freq_factor": 2.0}),
    ("yarn", {"attention_factor": 1.0}),
)
_UNREADABLE = {"proportional"}  # rope_types that transformers 4, SGLang and llama.cpp do not know
_SAME = 2e-4  # relative difference of frequencies below which two settings are one


@dataclass(frozen=True)
class Candidate:
    """A RoPE that may be measured.

    Attributes:
        name: for people; unique in a search.
        origin: native, analytic, theta or curve.
        rope: what would be written to the config.
        method, options: how `extend rescale` writes it; None for the native RoPE.
        shape: numbers that describe it, such as those of a `Curve`.
        aliases: names of other methods with the same frequencies.
    """

    name: str
    origin: str
    rope: RopeSpec
    method: str | None
    options: Mapping[str, Any]
    shape: Mapping[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """Names the frequencies and the attention factor, whatever the method that gave them."""
        numbers = [f"{v:.7e}" for v in inv_freq(self.rope).tolist()]
        numbers.append(f"{attention_factor(self.rope):.6f}")
        return hashlib.sha256(",".join(numbers).encode()).hexdigest()[:16]

    @property
    def may_be_chosen(self) -> bool:
        """Whether it is a change, and one that engines can read; others are only measured."""
        return self.origin != "native" and self.rope.rope_type not in _UNREADABLE


def native_candidate(spec: RopeSpec) -> Candidate:
    return Candidate("unchanged", "native", spec, None, {})


def theta_candidate(spec: RopeSpec, target_len: int, rope_theta: float) -> Candidate:
    """Plain RoPE with another theta, rounded to five digits."""
    rope_theta = float(f"{rope_theta:.5g}")
    options = {"rope_theta": rope_theta}
    return Candidate(f"theta {rope_theta:.4g}", "theta",
                     apply_method("theta", spec, target_len, options), "theta", options, options)


def curve_candidate(spec: RopeSpec, target_len: int, curve: Curve) -> Candidate:
    options: dict[str, Any] = {"long_factor": curve.factors(spec.rotary_dim // 2)}
    if curve.attention_factor != 1:
        options["attention_factor"] = curve.attention_factor
    name = (f"curve {curve.start:.1f}-{curve.end:.1f} x{curve.factor:.3g}^{curve.bend:.2g}"
            f" a{curve.attention_factor:.3g}")
    return Candidate(name, "curve", apply_method("longrope", spec, target_len, options),
                     "longrope", options, curve.to_json())


def analytic_candidates(spec: RopeSpec, target_len: int) -> tuple[list[Candidate], dict[str, str]]:
    """Every method that needs no option, and some with options, without repetitions.

    Returns:
        The candidates, and name -> reason of the methods that cannot be applied.
    """
    defaults = [(name, {}) for name, fn in METHODS.items()
                if all(p.default is not p.empty for p in option_names(fn).values())]
    # p-RoPE with the pairs that complete a turn in the native length.
    share = max(1, round(critical_index(spec))) / (spec.rotary_dim // 2)
    turning = ("proportional", {"partial_rotary_factor": round(min(share, 1.0), 4)})
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    for method, options in (*defaults, *_VARIANTS, turning):
        name = " ".join([method, *(f"{k}={v:g}" for k, v in options.items())])
        try:
            rope = apply_method(method, spec, target_len, options)
        except (RecipeError, CompatibilityError) as error:
            refused[name] = str(error)
            continue
        candidate = Candidate(name, "analytic", rope, method, options)
        same = next((i for i, other in enumerate(found) if is_same(other.rope, rope)), None)
        if same is None:
            found.append(candidate)
        else:
            found[same] = replace(found[same], aliases=(*found[same].aliases, name))
    return found, refused


def is_same(first: RopeSpec, second: RopeSpec) -> bool:
    """Whether two RoPEs turn alike, so that measuring both says nothing new."""
    a, b = inv_freq(first), inv_freq(second)
    close = bool(((a - b).abs() <= _SAME * a.abs()).all())
    return close and math.isclose(attention_factor(first), attention_factor(second), rel_tol=_SAME)


def features(spec: RopeSpec, rope: RopeSpec) -> "np.ndarray":
    """Logarithms of the factors of all pairs and ten times that of the attention, fp64 [d/2 + 1].

    A pair that stands still counts as one that is a thousand times slower.
    """
    import numpy as np

    plain, changed = inv_freq(spec).numpy(), inv_freq(rope).numpy()
    ratio = plain / np.maximum(changed, plain * 1e-3)
    return np.append(np.log(ratio), 10 * math.log(attention_factor(rope)))
