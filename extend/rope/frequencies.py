"""The rotation speeds that a `RopeSpec` stands for, in fp64.

The model itself computes them in fp32 from the written config; these are for plans, reports and
tests. Pairs are ordered from the fastest to the slowest, index i of rotary_dim / 2.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from extend.errors import CompatibilityError
from extend.model_config import RopeSpec, longrope_mscale, yarn_mscale

if TYPE_CHECKING:
    import torch

YARN_BETA_FAST = 32.0  # turns; the values every reader assumes when the keys are absent
YARN_BETA_SLOW = 1.0


def inv_freq(spec: RopeSpec, length: int | None = None) -> "torch.Tensor":
    """Radians per token of each pair, fp64 [rotary_dim / 2].

    Args:
        length: tokens of the row that is read, where that matters (dynamic, longrope with two
            lists); None: the length that the scaling was made for, original_len x factor.

    Raises:
        CompatibilityError: a rope_type that is not one of `ROPE_TYPES`, or a key it lacks.
    """
    if spec.rope_type not in ROPE_TYPES:
        raise CompatibilityError(f"rope_type {spec.rope_type!r} is not supported; "
                                 f"choose one of {', '.join(ROPE_TYPES)}")
    return ROPE_TYPES[spec.rope_type](spec, length)


def attention_factor(spec: RopeSpec) -> float:
    """What cos and sin are multiplied by; attention scores scale with its square.

    Source: yarn: Peng et al. 2023, arXiv:2309.00071, section 3.4, with `mscale` and
    `mscale_all_dim` as DeepSeek uses them. longrope: Ding et al. 2024, arXiv:2402.13753, with
    `long_mscale` as Phi-3.5-MoE uses it.
    """
    if spec.rope_type not in ("yarn", "longrope"):
        return 1.0
    given = spec.scaling.get("attention_factor", spec.scaling.get("long_mscale"))
    if given is not None:
        return float(given)
    factor = _need(spec, "factor")
    if spec.rope_type == "longrope":
        return longrope_mscale(factor, spec.original_len)
    mscale, mscale_all_dim = spec.scaling.get("mscale"), spec.scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor)


def wavelengths(spec: RopeSpec) -> "torch.Tensor":
    """Tokens in which each pair makes one turn, fp64 [rotary_dim / 2]; inf where it stands still.
    """
    return 2 * math.pi / inv_freq(spec)


def turns(spec: RopeSpec, length: int | None = None) -> "torch.Tensor":
    """Turns of each pair within `length` tokens (default: original_len), fp64 [rotary_dim / 2]."""
    return (length or spec.original_len) / wavelengths(spec)


def critical_index(spec: RopeSpec) -> float:
    """The (real) pair index whose wavelength is the original length, before any scaling.

    Pairs above it never completed a turn in training.

    Source: Liu et al. 2023, arXiv:2310.05209; their critical dimension is twice its ceiling.
    """
    return spec.rotary_dim / 2 * math.log(spec.original_len / (2 * math.pi), spec.rope_theta)


def _plain(rope_theta: float, rotary_dim: int) -> "torch.Tensor":
    import torch

    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return rope_theta ** -exponent


def _default(spec: RopeSpec, length: int | None = None) -> "torch.Tensor":
    return _plain(spec.rope_theta, spec.rotary_dim)


def _linear(spec: RopeSpec, length: int | None) -> "torch.Tensor":
    return _default(spec) / _need(spec, "factor")


def _dynamic(spec: RopeSpec, length: int | None) -> "torch.Tensor":
    """NTK-aware with a theta for each length; up to the original length, plain RoPE."""
    factor = _need(spec, "factor")
    ratio = factor if length is None else max(length / spec.original_len, 1.0)
    growth = (factor * ratio - (factor - 1)) ** (spec.rotary_dim / (spec.rotary_dim - 2))
    return _plain(spec.rope_theta * growth, spec.rotary_dim)


def _proportional(spec: RopeSpec, length: int | None) -> "torch.Tensor":
    """The first pairs turn as in plain RoPE over all channels, the others stand still."""
    import torch

    turning = int(_need(spec, "partial_rotary_factor") * spec.rotary_dim // 2)
    speeds = _default(spec) / spec.scaling.get("factor", 1.0)
    return torch.where(torch.arange(len(speeds)) < turning, speeds, 0.0)


def _llama3(spec: RopeSpec, length: int | None) -> "torch.Tensor":
    """NTK-by-parts: the share that stays grows linearly with the turns in the original length."""
    plain = _default(spec)
    low, high = _need(spec, "low_freq_factor"), _need(spec, "high_freq_factor")
    kept = ((spec.original_len * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / _need(spec, "factor")


def _yarn(spec: RopeSpec, length: int | None) -> "torch.Tensor":
    import torch

    plain = _default(spec)
    low, high = yarn_ramp(spec)
    # As in the reference, a ramp of no length becomes a step.
    width = high - low if high != low else 0.001
    scaled = ((torch.arange(plain.numel(), dtype=torch.float64) - low) / width).clamp(0, 1)
    return plain * (1 - scaled) + plain / _need(spec, "factor") * scaled


def _longrope(spec: RopeSpec, length: int | None) -> "torch.Tensor":
    import torch

    short = length is not None and length <= spec.original_len
    factors = _need(spec, "short_factor" if short else "long_factor")
    return _default(spec) / torch.tensor(factors, dtype=torch.float64)


def yarn_ramp(spec: RopeSpec) -> tuple[float, float]:
    """First and last pair index of YaRN's ramp, rounded outwards unless `truncate` is false."""
    low = _index_of_turns(spec, spec.scaling.get("beta_fast") or YARN_BETA_FAST)
    high = _index_of_turns(spec, spec.scaling.get("beta_slow") or YARN_BETA_SLOW)
    if spec.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, spec.rotary_dim - 1)


def _index_of_turns(spec: RopeSpec, count: float) -> float:
    """The (real) index of the pair that makes `count` turns within the original length."""
    wavelength = spec.original_len / count
    return spec.rotary_dim / 2 * math.log(wavelength / (2 * math.pi), spec.rope_theta)


def _need(spec: RopeSpec, key: str) -> Any:
    value = spec.scaling.get(key)
    if value is None:
        raise CompatibilityError(f"rope_type {spec.rope_type!r} lacks {key!r} in rope_parameters "
                                 "(or rope_scaling) of config.json; add it")
    return value


ROPE_TYPES: dict[str, Callable[[RopeSpec, int | None], "torch.Tensor"]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "proportional": _proportional,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
