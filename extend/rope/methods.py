"""How RoPE changes when a model is given a longer context.

Each method is a pure function `(spec, target_len, *, options) -> RopeSpec`. Four families:

- theta, ntk, critical, gradient-v1, gradient-v2 and the presets (prolong, easycontext, lwm,
  qwen2.5-1m) give plain RoPE another theta. The result is an ordinary model of length `target_len`,
  so its `original_len` is `target_len` and the method can be applied again, stage by stage.
- linear divides every frequency by the factor.
- ntk-by-parts (llama3 is another name for it) and yarn leave the fast pairs alone and divide the
  slow ones by the factor. Fast pairs carry the short-range skills, so these keep a sibling
  fine-tune's skills intact.
- longrope and proportional say for each pair what becomes of it.

All but the first family write an HF scaling entry. Such a spec cannot be rescaled again: start from
the plain one and give the final length. `resonance: true` goes with every method.

No torch here: `extend plan` and the recipe check read this table.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec
from extend.registry import check_options, lookup
from extend.rope.factors import (
    check_above,
    extension_factor,
    longrope,
    resonant,
    yarn_attention_keys,
)
from extend.rope.frequencies import YARN_BETA_FAST, YARN_BETA_SLOW
from extend.rope.presets import easycontext, lwm, prolong, qwen2_5_1m

RESONANCE = "resonance"
"""Option of every method: round wavelengths to whole tokens."""


def theta(spec: RopeSpec, target_len: int, *, rope_theta: float) -> RopeSpec:
    """Plain RoPE with the theta that you give.

    The one method that may change the model at its native length: the value is always applied.

    Raises:
        RecipeError: `rope_theta` is not a finite number above 1.
    """
    extension_factor(spec, target_len)
    check_above("rope_theta", rope_theta, 1)
    return _plain(spec, rope_theta, target_len)


def linear(spec: RopeSpec, target_len: int) -> RopeSpec:
    """Position interpolation: every frequency divided by the factor.

    vLLM and SGLang multiply `max_position_embeddings` by the factor of this one type, so they
    report `factor` times the true length unless told a maximum.

    Source: Chen et al. 2023, arXiv:2306.15595.
    """
    factor = extension_factor(spec, target_len)
    if factor == 1:
        return spec
    return replace(spec, scaling={"rope_type": "linear", "factor": factor})


def ntk(spec: RopeSpec, target_len: int) -> RopeSpec:
    """NTK-aware: the theta that divides the slowest pair by the factor and keeps the fastest.

    theta' = theta * s^(d / (d - 2)), d = rotary_dim.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.1.
    """
    factor = extension_factor(spec, target_len)
    return _plain(spec, _ntk_theta(spec, factor), target_len)


def critical(spec: RopeSpec, target_len: int) -> RopeSpec:
    """The theta under which as many pairs complete a turn in the new length as did in the old.

    theta' = theta^(ln(T / 2 pi) / ln(L / 2 pi)). Applying it in stages or at once is the same.

    Source: Liu et al. 2023, arXiv:2310.05209; their extrapolation bound solved for the base.
    """
    if extension_factor(spec, target_len) == 1:
        return spec
    return _plain(spec, _critical_theta(spec, target_len), target_len)


def ntk_by_parts(spec: RopeSpec, target_len: int, *, low_freq_factor: float = 1.0,
                 high_freq_factor: float = 4.0) -> RopeSpec:
    """Divide by the factor only what turns rarely in the native length.

    A pair that makes more than `high_freq_factor` turns within the native length stays as it is,
    one with fewer than `low_freq_factor` is divided by the factor, and between them the weight is
    linear in the number of turns. In HF keys that is rope_type `llama3`, which every loader knows;
    there is no attention factor. The defaults are Llama 3.1's; the YaRN paper takes 1 and 32.

    Raises:
        RecipeError: unless 0 < low_freq_factor < high_freq_factor.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2 (its alpha and beta are the options).
    """
    factor = extension_factor(spec, target_len)
    _check_ramp("low_freq_factor", low_freq_factor, "high_freq_factor", high_freq_factor)
    if factor == 1:
        return spec
    return replace(spec, scaling={
        "rope_type": "llama3", "factor": factor, "low_freq_factor": float(low_freq_factor),
        "high_freq_factor": float(high_freq_factor),
        "original_max_position_embeddings": spec.original_len})


def yarn(spec: RopeSpec, target_len: int, *, beta_fast: float = YARN_BETA_FAST,
         beta_slow: float = YARN_BETA_SLOW, attention_factor: float | None = None,
         mscale: float | None = None, mscale_all_dim: float | None = None,
         truncate: bool = True) -> RopeSpec:
    """By parts with a ramp over the pair index, and queries and keys scaled up a little.

    Options at their defaults are not written, because readers agree on the defaults but not on
    the keys (older ones know no `attention_factor`).

    Args:
        beta_fast: turns in the native length above which a pair stays as it is.
        beta_slow: turns below which a pair is divided by the factor.
        attention_factor: multiplies cos and sin; None means 0.1 ln(factor) + 1.
        mscale, mscale_all_dim: DeepSeek's way to the same number, given together:
            (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
        truncate: round the ends of the ramp outwards to whole pairs.

    Raises:
        RecipeError: unless 0 < beta_slow < beta_fast and the others are above 0; one mscale
            without the other, or both with an attention factor.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.4.
    """
    factor = extension_factor(spec, target_len)
    _check_ramp("beta_slow", beta_slow, "beta_fast", beta_fast)
    attention = _yarn_attention(factor, attention_factor, mscale, mscale_all_dim)
    if not isinstance(truncate, bool):
        raise RecipeError(f"truncate must be true or false, not {truncate!r}")
    if factor == 1:
        return spec
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor,
                               "original_max_position_embeddings": spec.original_len}
    if beta_fast != YARN_BETA_FAST:
        scaling["beta_fast"] = float(beta_fast)
    if beta_slow != YARN_BETA_SLOW:
        scaling["beta_slow"] = float(beta_slow)
    scaling |= attention
    if not truncate:
        scaling["truncate"] = False
    return replace(spec, scaling=scaling)


def _yarn_attention(factor: float, attention_factor: float | None, mscale: float | None,
                    mscale_all_dim: float | None) -> dict[str, float]:
    given = {name: value for name, value in (
        ("attention_factor", attention_factor), ("mscale", mscale),
        ("mscale_all_dim", mscale_all_dim)) if value is not None}
    for name, value in given.items():
        check_above(name, value, 0)
    if set(given) not in (set(), {"attention_factor"}, {"mscale", "mscale_all_dim"}):
        told = ", ".join(f"{name} {value}" for name, value in given.items())
        raise RecipeError("give attention_factor alone, or mscale and mscale_all_dim together, "
                          f"not {told}")
    if attention_factor is not None:
        return yarn_attention_keys(attention_factor, factor)
    return {name: float(value) for name, value in given.items()}


def proportional(spec: RopeSpec, target_len: int, *, partial_rotary_factor: float,
                 factor: float = 1.0) -> RopeSpec:
    """p-RoPE: the fastest pairs turn as they did, the others stand still.

    Without the slow pairs, whose angles a model has seen in part only, no angle of the longer
    context is new. transformers 5 computes it, transformers 4, vLLM and llama.cpp mostly do not.

    Args:
        partial_rotary_factor: share of all pairs that still turn, above 0 and at most 1.
        factor: what their frequencies are divided by.

    Raises:
        RecipeError: an option out of range.
        CompatibilityError: too small a share to keep a pair.

    Source: Barbero et al. 2024, arXiv:2410.06205, in the keys of transformers' `proportional`.
    """
    ratio = extension_factor(spec, target_len)
    check_above("partial_rotary_factor", partial_rotary_factor, 0)
    check_above("factor", factor, 0)
    if partial_rotary_factor > 1 or factor < 1:
        raise RecipeError(f"partial_rotary_factor must be at most 1 and factor at least 1, not "
                          f"{partial_rotary_factor} and {factor}")
    if int(partial_rotary_factor * spec.rotary_dim // 2) == 0:
        raise CompatibilityError(f"partial_rotary_factor {partial_rotary_factor} leaves none of "
                                 f"{spec.rotary_dim // 2} pairs turning; give a larger one")
    if ratio == 1 and factor == 1 and partial_rotary_factor == 1:
        return spec
    # factor 1 is left out: some readers warn of the key, others stretch the length by it.
    divided = {} if factor == 1 else {"factor": float(factor)}
    return replace(spec, scaling={"rope_type": "proportional", **divided,
                                  "partial_rotary_factor": float(partial_rotary_factor)})


def dynamic(spec: RopeSpec, target_len: int) -> NoReturn:
    """Dynamic NTK, which models may have and which this toolkit does not write.

    Raises:
        RecipeError: always, with the reason.

    Source: transformers, modeling_rope_utils.py; vLLM, dynamic_ntk_scaling_rope.py.
    """
    raise RecipeError(
        "dynamic is read but not written: it has other frequencies at every length, so keys that "
        "were cached at one contradict queries at the next, and vLLM and SGLang take those of the "
        f"longest length for all; choose ntk, which has one theta for {target_len} tokens")


def gradient_v1(spec: RopeSpec, target_len: int, *, factor: float = 4.0) -> RopeSpec:
    """One stage of the schedule behind Gradient's first long Llama 3 models.

    theta' = int(theta * (factor * s - (factor - 1))^(d / (d - 2))), s the stage's own ratio: call
    it once per stage, because one large step does not give the theta of several small ones.
    (Their 1048K value was taken from the 524K one before it was cut to a whole number; from the
    published 1062356830 the formula gives 2804339833, two less than theirs.)

    Args:
        factor: 4 in all their stages but the last one to 1048K, which took 1.6.

    Raises:
        RecipeError: `factor` is not above 0.

    Source: solved from the `rope_theta` of the published gradientai/Llama-3 configs (15296098,
    207112184, 1062356830, 2804339835); the formula is transformers' dynamic NTK.
    """
    ratio = extension_factor(spec, target_len)
    check_above("factor", factor, 0)
    if ratio == 1:
        return spec
    return _plain(spec, int(_ntk_theta(spec, factor * ratio - (factor - 1))), target_len)


def gradient_v2(spec: RopeSpec, target_len: int) -> RopeSpec:
    """`critical` rounded to a whole number, as in Gradient's second series.

    Gives all three of their thetas: 283461213 (262K), 3580165449 (1048K), 45218125210 (4194K).

    Source: solved from the `rope_theta` of the published gradientai/Llama-3 configs.
    """
    if extension_factor(spec, target_len) == 1:
        return spec
    return _plain(spec, round(_critical_theta(spec, target_len)), target_len)


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Check that there is such a method and that it takes these options.

    Raises:
        RecipeError: unknown method or option, or a required option that is missing.
    """
    fn = lookup(METHODS, method, "method")
    own = {name: value for name, value in options.items() if name != RESONANCE}
    check_options(fn, own, f"method {method}")
    if not isinstance(options.get(RESONANCE, False), bool):
        raise RecipeError(f"{RESONANCE} must be true or false, not {options[RESONANCE]!r}")


def apply_method(method: str, spec: RopeSpec, target_len: int,
                 options: Mapping[str, Any]) -> RopeSpec:
    """Look `method` up, check its options and return the new RoPE.

    Raises:
        RecipeError: unknown method or option, or a value that is not accepted.
        CompatibilityError: the model's RoPE is scaled already, or is none that the method is for.
    """
    check_method(method, options)
    own = {name: value for name, value in options.items() if name != RESONANCE}
    try:
        new = METHODS[method](spec, target_len, **own)
    except OverflowError:
        raise CompatibilityError(
            f"method {method} leaves the range of numbers from theta {spec.rope_theta:g} and "
            f"{spec.original_len} tokens to {target_len}; check the native theta and length, or "
            "give a nearer target") from None
    return resonant(new, target_len) if options.get(RESONANCE) else new


def _plain(spec: RopeSpec, rope_theta: float, target_len: int) -> RopeSpec:
    if math.isinf(rope_theta):  # a product, which overflows without an error
        raise OverflowError
    return replace(spec, rope_theta=float(rope_theta), original_len=target_len)


def _ntk_theta(spec: RopeSpec, factor: float) -> float:
    if spec.rotary_dim < 4:
        raise CompatibilityError(f"the model rotates {spec.rotary_dim} channels per head; this "
                                 "method needs at least 4, choose linear or theta")
    return spec.rope_theta * factor ** (spec.rotary_dim / (spec.rotary_dim - 2))


def _critical_theta(spec: RopeSpec, target_len: int) -> float:
    turn = 2 * math.pi
    if spec.original_len <= turn:
        raise CompatibilityError(f"the native length {spec.original_len} is below one turn of the "
                                 "fastest pair (2 pi tokens); choose linear or theta")
    return spec.rope_theta ** (math.log(target_len / turn) / math.log(spec.original_len / turn))


def _check_ramp(low_name: str, low: float, high_name: str, high: float) -> None:
    check_above(low_name, low, 0)
    check_above(high_name, high, low)


METHODS: dict[str, Callable[..., RopeSpec]] = {
    "theta": theta,
    "linear": linear,
    "ntk": ntk,
    "critical": critical,
    "ntk-by-parts": ntk_by_parts,
    "llama3": ntk_by_parts,
    "yarn": yarn,
    "longrope": longrope,
    "proportional": proportional,
    "dynamic": dynamic,
    "gradient-v1": gradient_v1,
    "gradient-v2": gradient_v2,
    "prolong": prolong,
    "easycontext": easycontext,
    "lwm": lwm,
    "qwen2.5-1m": qwen2_5_1m,
}
