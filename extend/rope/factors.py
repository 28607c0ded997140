"""The factor of an extension, and one factor for each pair."""

import math
from collections.abc import Sequence
from dataclasses import replace

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec


def extension_factor(spec: RopeSpec, target_len: int) -> float:
    """Return target_len / original_len, at least 1.

    Raises:
        CompatibilityError: `spec` is scaled already.
        RecipeError: `target_len` is below the native length.
    """
    if spec.scaling:
        raise CompatibilityError(
            f"the model's RoPE is scaled already (rope_type {spec.rope_type!r} from "
            f"{spec.original_len} tokens) and a second scaling cannot be put on top; start from "
            "the checkpoint before that scaling")
    if target_len < spec.original_len:
        raise RecipeError(f"target length {target_len} is below the model's native length "
                          f"{spec.original_len}; give {spec.original_len} or more")
    return target_len / spec.original_len


def check_above(name: str, value: object, bound: float) -> None:
    """Raise RecipeError unless `value` is a finite number above `bound`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not bound < value < math.inf:
        raise RecipeError(f"{name} must be a finite number above {bound}, not {value!r}")


def longrope(spec: RopeSpec, target_len: int, *, long_factor: Sequence[float],
             short_factor: Sequence[float] | None = None,
             attention_factor: float = 1.0) -> RopeSpec:
    """Every pair's frequency divided by a number of its own.

    With equal lists the frequencies do not depend on the length, so that every reader computes the
    same ones and cached keys stay right.

    Args:
        long_factor: rotary_dim / 2 divisors of the plain frequencies, fastest pair first.
        short_factor: what rows up to the native length are divided by; None: the same.
        attention_factor: multiplies cos and sin.

    Raises:
        RecipeError: a list of another length, or a number that is not above 0.

    Source: Ding et al. 2024, arXiv:2402.13753, in the keys of transformers' `longrope`.
    """
    factor = extension_factor(spec, target_len)
    check_above("attention_factor", attention_factor, 0)
    long = _pair_factors("long_factor", long_factor, spec)
    short = long if short_factor is None else _pair_factors("short_factor", short_factor, spec)
    if factor == 1 and all(value == 1 for value in (*long, *short)) and attention_factor == 1:
        return spec
    return replace(spec, scaling={
        "rope_type": "longrope", "factor": factor, "short_factor": short, "long_factor": long,
        "attention_factor": float(attention_factor),
        "original_max_position_embeddings": spec.original_len})


def _pair_factors(name: str, values: Sequence[float], spec: RopeSpec) -> list[float]:
    pairs = spec.rotary_dim // 2
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != pairs:
        count = len(values) if isinstance(values, Sequence) else "none"
        raise RecipeError(f"{name} must be a list of {pairs} numbers, one for each pair of the "
                          f"{spec.rotary_dim} rotated channels; it has {count}")
    for i, value in enumerate(values):
        check_above(f"{name}[{i}]", value, 0)
    return [float(value) for value in values]
