"""The factor of an extension, and methods that give each pair a factor of its own."""

import math
from collections.abc import Sequence
from dataclasses import replace

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import NATIVE_KEY_TYPES, RopeSpec, longrope_mscale, yarn_mscale
from extend.rope import frequencies

FOR_OTHER_ENGINES = frozenset({"short_mscale", "long_mscale", "attn_factor"})
"""Keys of an attention factor that vLLM and SGLang read and transformers does not know."""


_MOST = 1e6  # times that a frequency is divided by; wavelengths of 1M tokens take far less


def extension_factor(spec: RopeSpec, target_len: int) -> float:
    """Return target_len / original_len, at least 1.

    Raises:
        CompatibilityError: `spec` is scaled already.
        RecipeError: `target_len` is below the native length.
    """
    check_plain(spec)
    if target_len < spec.original_len:
        raise RecipeError(f"target length {target_len} is below the model's native length "
                          f"{spec.original_len}, a factor below 1; give {spec.original_len} or "
                          "more")
    return target_len / spec.original_len


def check_plain(spec: RopeSpec) -> None:
    """Raise CompatibilityError for a RoPE that is scaled already."""
    if spec.scaling:
        raise CompatibilityError(
            f"the model's RoPE is extended already: {describe_extension(spec)}, and a second "
            "scaling cannot be put on top; start from the checkpoint before it, or rescale with "
            "from_len (--from), the length to start again from with plain RoPE")


def describe_extension(spec: RopeSpec, max_len: int | None = None) -> str:
    """From what to what a scaled RoPE was extended, such as `rope_type 'yarn' from 8192 to 131072`.

    Args:
        max_len: tokens, the model's `max_position_embeddings` where it is known. A linear or
            dynamic RoPE does not say which of the two lengths that is.
    """
    factor, native = float(spec.scaling.get("factor", 1)), spec.original_len
    if max_len == native and factor > 1 and spec.rope_type not in NATIVE_KEY_TYPES:
        return f"rope_type {spec.rope_type!r} by a factor of {factor:g} with {native} tokens"
    reach = max(max_len or 0, round(native * factor))
    lengths = f"from {native} to {reach}" if reach > native else f"for {native}"
    return f"rope_type {spec.rope_type!r} {lengths} tokens"


def check_above(name: str, value: object, bound: float) -> None:
    """Raise RecipeError unless `value` is a finite number above `bound`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not bound < value < math.inf:
        raise RecipeError(f"{name} must be a finite number above {bound}, not {value!r}")


def longrope(spec: RopeSpec, target_len: int, *, long_factor: Sequence[float],
             short_factor: Sequence[float] | None = None,
             attention_factor: float = 1.0, found_for: int | str | None = None) -> RopeSpec:
    """Every pair's frequency divided by a number of its own.

    With one list for all lengths (no `short_factor`) the frequencies do not depend on the length:
    every reader computes the same, and cached keys stay right. The native length is then written as
    the target, because vLLM and SGLang would otherwise compute an attention factor from the ratio
    of the two, and vLLM take the native length for the longest it may read.

    With two lists a reader changes over where a text outgrows the native length, each in its own
    way (transformers by the row in hand, vLLM by the longest it was started for).

    Args:
        long_factor: rotary_dim / 2 divisors of the plain frequencies, fastest pair first.
        short_factor: what rows up to the native length are divided by; None: the same.
        attention_factor: multiplies cos and sin.
        found_for: tokens, the length that the factors are for. For another target they are carried
            on: with p = log(target / native) / log(found_for / native), each factor is raised to
            the power p, and what the attention factor is above 1 is multiplied by p.

    Raises:
        RecipeError: a list of another length, a number that is not above 0, `found_for` beside
            `short_factor`, or not above the native length.

    Source: Ding et al. 2024, arXiv:2402.13753, in the keys of transformers' `longrope`; vLLM,
    phi3_long_rope_scaled_rope.py.
    """
    factor = extension_factor(spec, target_len)
    check_above("attention_factor", attention_factor, 0)
    long = _pair_factors("long_factor", long_factor, spec)
    if found_for is not None:
        if short_factor is not None:
            raise RecipeError("found_for carries one list on, but short_factor gives two; leave "
                              "one of them out")
        long, attention_factor = _carry_on(spec, factor, long, attention_factor, found_for)
    short = long if short_factor is None else _pair_factors("short_factor", short_factor, spec)
    if factor == 1 and attention_factor == 1 and all(value == 1 for value in (*long, *short)):
        return spec
    if short == long:
        return per_pair(spec, target_len, long, attention_factor)
    return replace(spec, scaling={
        "rope_type": "longrope", "factor": factor, "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": spec.original_len,
        **longrope_attention_keys(attention_factor, longrope_mscale(factor, spec.original_len))})


def _carry_on(spec: RopeSpec, factor: float, factors: list[float], attention_factor: float,
              found_for: int | str) -> tuple[list[float], float]:
    """What was found for one length, for an extension by `factor`; see `longrope`."""
    from extend.option_types import parse_length  # imports pydantic, for which --help need not wait

    try:
        found_len = parse_length(found_for)
    except ValueError as error:
        raise RecipeError(f"found_for: {error}") from None
    if found_len <= spec.original_len:
        raise RecipeError(f"found_for is {found_len}, not above the model's native length "
                          f"{spec.original_len}; give the length that the factors were found for")
    power = math.log(factor) / math.log(found_len / spec.original_len)
    carried = 1 + power * (attention_factor - 1)
    widest = power * max(abs(math.log(value)) for value in factors)
    if widest > math.log(_MOST) or not 0 < carried < _MOST:
        raise RecipeError(
            f"found_for is {found_len}: carried on to {round(factor * spec.original_len)} tokens, "
            f"{power:.3g} times as far, attention_factor {attention_factor:g} becomes "
            f"{carried:.3g} and factors of {min(factors):g} to {max(factors):g} reach e to the "
            f"{widest:.3g}; give what was found for a length nearer to the target")
    return [value ** power for value in factors], carried


def per_pair(spec: RopeSpec, target_len: int, factors: list[float],
             attention_factor: float) -> RopeSpec:
    """A model of `target_len` tokens whose plain frequencies are divided by `factors`."""
    return replace(spec, original_len=target_len, scaling={
        "rope_type": "longrope", "factor": 1.0, "short_factor": factors,
        "long_factor": list(factors), "original_max_position_embeddings": target_len,
        **longrope_attention_keys(attention_factor, 1.0)})


def longrope_attention_keys(attention_factor: float, usual: float) -> dict[str, float]:
    """The factor where transformers reads it, and where vLLM and SGLang do if they must be told.

    transformers logs the latter's `short_mscale` and `long_mscale` as keys it does not know.

    Args:
        usual: what the engines take from the two lengths when there is no key.
    """
    value = float(attention_factor)
    keys = {"attention_factor": value}
    if math.isclose(value, usual, rel_tol=1e-9):
        return keys
    return keys | {"short_mscale": value, "long_mscale": value}


def yarn_attention_keys(attention_factor: float, factor: float) -> dict[str, float]:
    """The factor where transformers and new vLLM read it, and the multiplier that others read.

    SGLang and vLLM before September 2026 know `attn_factor` alone, and multiply their own number by
    it. Nothing is written where that number is right.

    Args:
        factor: of the extension.
    """
    usual = yarn_mscale(factor)
    if math.isclose(attention_factor, usual, rel_tol=1e-9):
        return {}
    return {"attention_factor": float(attention_factor), "attn_factor": attention_factor / usual}


def resonant(spec: RopeSpec, target_len: int) -> RopeSpec:
    """`spec` with every wavelength rounded to a whole number of tokens.

    A pair then meets the same angles again turn after turn, so that no new ones appear beyond the
    length it was trained on. Written as `longrope` with one list.

    Raises:
        RecipeError: a pair that does not turn, or frequencies that depend on the length.

    Source: Wang et al. 2024, arXiv:2403.00071.
    """
    if spec.depends_on_length:
        raise RecipeError("resonance needs frequencies that are the same at every length; leave "
                          "short_factor out")
    waves = frequencies.wavelengths(spec)
    if not bool(waves.isfinite().all()):
        raise RecipeError("resonance rounds wavelengths, but some pairs of this RoPE do not turn; "
                          "choose another method, or leave resonance out")
    plain = frequencies.wavelengths(replace(spec, scaling={}))
    factors = (waves.round() / plain).tolist()
    return per_pair(spec, target_len, factors, frequencies.attention_factor(spec))


def _pair_factors(name: str, values: Sequence[float], spec: RopeSpec) -> list[float]:
    pairs = spec.rotary_dim // 2
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != pairs:
        found = repr(values) if isinstance(values, str) or not isinstance(values, Sequence) \
            else f"a list of {len(values)}"
        raise RecipeError(f"{name} must be a list of {pairs} numbers, one for each pair of the "
                          f"{spec.rotary_dim} rotated channels, not {found}")
    for i, value in enumerate(values):
        check_above(f"{name}[{i}]", value, 0)
    return [float(value) for value in values]
