"""Thetas against published models and closed forms, and what holds for every method."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec
from extend.rope import METHODS
from extend.rope.frequencies import attention_factor, critical_index, inv_freq
from extend.rope.methods import apply_method, check_method
from tests.rope.specs import (
    ANY_BASE,
    BASES,
    LLAMA2,
    LLAMA3,
    NEW_THETA,
    PUBLISHED,
    QWEN,
    SMALL,
    STILL,
    TINY,
    WRITTEN,
    call,
    options_for,
)


@pytest.mark.parametrize("row", PUBLISHED["llama3_8k_theta"], ids=lambda r: str(r["T"]))
def test_llama3_thetas(row):
    # Powers of fp64 numbers: a few units in the last place.
    assert call("ntk", LLAMA3, row["T"]).rope_theta == pytest.approx(row["ntk"], rel=1e-12)
    assert call("critical", LLAMA3, row["T"]).rope_theta == pytest.approx(
        row["critical"], rel=1e-12)
    assert call("gradient-v1", LLAMA3, row["T"]).rope_theta == math.floor(row["dyn_f4_oneshot"])


def test_gradient_v1_schedule_is_exact():
    spec, thetas = LLAMA3, []
    for length in (65536, 262144, 524288):
        spec = call("gradient-v1", spec, length)
        thetas.append(spec.rope_theta)
    assert thetas == [PUBLISHED["gradient_v1"][key] for key in ("65536", "262144", "524288")]


def test_gradient_v1_last_stage_started_from_the_uncut_value():
    uncut = 207112184 * (4 * 2 - 3) ** (128 / 126)
    before = RopeSpec(rope_theta=uncut, rotary_dim=128, original_len=524288)
    expected = PUBLISHED["gradient_v1"]["1048576(f=1.6)"]
    assert call("gradient-v1", before, 1048576, factor=1.6).rope_theta == expected == 2804339835
    published = RopeSpec(rope_theta=1062356830, rotary_dim=128, original_len=524288)
    assert call("gradient-v1", published, 1048576, factor=1.6).rope_theta == 2804339833


@pytest.mark.parametrize(("length", "theta"), [
    (262144, 283461213), (1048576, 3580165449), (4194304, 45218125210)])
def test_gradient_v2_is_exact(length, theta):
    assert call("gradient-v2", LLAMA3, length).rope_theta == theta
    uncut = PUBLISHED["gradient_v2"][str(length)]
    assert call("critical", LLAMA3, length).rope_theta == pytest.approx(uncut, rel=1e-12)


@pytest.mark.parametrize(("spec", "length", "key"), [
    (LLAMA3, 16384, "l3_16384"), (LLAMA2, 8192, "l2_8192"), (LLAMA2, 12288, "l2_12288"),
    (LLAMA2, 16384, "l2_16384"),
    (QWEN, 131072, "mistral_large_32k_128k_1e6")])
def test_critical_against_another_implementation(spec, length, key):
    exact, printed = PUBLISHED["koboldcpp_pr910"][key]
    theta = call("critical", spec, length).rope_theta
    assert theta == pytest.approx(exact, rel=1e-12)
    # The other implementation prints one decimal at most, sometimes none.
    assert theta == pytest.approx(printed, abs=1.0)


STAGES = (20000, 65536, 300000, 1048576)


@pytest.mark.parametrize("method", ["critical", "ntk"])
def test_stages_compose(method):
    staged = LLAMA3
    for length in STAGES:
        staged = call(method, staged, length)
    once = call(method, LLAMA3, 1048576)
    assert staged.rope_theta == pytest.approx(once.rope_theta, rel=1e-12)
    assert staged.original_len == once.original_len == 1048576


def test_gradient_v2_composes_up_to_its_rounding():
    staged = LLAMA3
    for length in STAGES:
        staged = call("gradient-v2", staged, length)
    assert staged.rope_theta == pytest.approx(call("gradient-v2", LLAMA3, 1048576).rope_theta,
                                              rel=1e-6)


def test_what_does_not_compose():
    """One large step gives another theta than two small ones, by a factor that the formula tells.
    """
    half = call("gradient-v1", LLAMA3, 65536)
    staged, once = call("gradient-v1", half, 524288), call("gradient-v1", LLAMA3, 524288)
    ratio = (29 * 29 / (4 * 64 - 3)) ** (128 / 126)
    assert staged.rope_theta / once.rope_theta == pytest.approx(ratio, rel=1e-6)
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    first = replace(LLAMA3, scaling=dynamic)
    theta = 500_000 * 29 ** (128 / 126)
    torch.testing.assert_close(inv_freq(first, 65536), inv_freq(replace(LLAMA3, rope_theta=theta)),
                               rtol=1e-12, atol=0)
    again = replace(LLAMA3, rope_theta=theta, original_len=65536, scaling=dynamic)
    assert (inv_freq(again, 524288)[1:] < inv_freq(first, 524288)[1:] * 0.999).all()


@pytest.mark.parametrize("method", ["linear", "ntk-by-parts", "llama3", "yarn", "proportional"])
def test_scalings_count_from_the_native_length(method):
    """Their second step would start from scaled frequencies, so there is none, only a longer one.
    """
    assert call(method, LLAMA3, 65536).original_len == LLAMA3.original_len
    with pytest.raises(CompatibilityError, match="extended already"):
        call(method, call(method, LLAMA3, 65536), 131072)


def test_critical_keeps_the_critical_index():
    for length in (16384, 131072, 4194304):
        assert critical_index(call("critical", LLAMA3, length)) == pytest.approx(
            critical_index(LLAMA3), rel=1e-12)


def test_ntk_divides_the_slowest_pair_by_the_factor():
    before, after = inv_freq(LLAMA3), inv_freq(call("ntk", LLAMA3, 8192 * 16))
    torch.testing.assert_close(after[-1] * 16, before[-1], rtol=1e-12, atol=0)


def test_linear_is_position_interpolation():
    torch.testing.assert_close(inv_freq(call("linear", LLAMA3, 8192 * 4)) * 4, inv_freq(LLAMA3),
                               rtol=1e-15, atol=0)


def test_by_parts_leaves_fast_pairs_bit_for_bit():
    before, after = inv_freq(SMALL), inv_freq(call("ntk-by-parts", SMALL, 131072))
    turns = SMALL.original_len * before / (2 * math.pi)
    assert torch.equal(after[turns > 4], before[turns > 4])
    torch.testing.assert_close(after[turns < 1], before[turns < 1] / 16, rtol=1e-15, atol=0)
    between = (turns >= 1) & (turns <= 4)
    assert between.any()
    assert (after[between] > before[between] / 16).all()
    assert (after[between] < before[between]).all()


@pytest.mark.parametrize("spec", BASES, ids=lambda s: f"{s.rotary_dim}-{s.rope_theta:.0f}")
@pytest.mark.parametrize("method", ["ntk", "critical", "ntk-by-parts", "yarn", "gradient-v1"])
@pytest.mark.parametrize("factor", [2, 16, 512])
def test_the_fastest_pair_is_left_alone(method, spec, factor):
    assert inv_freq(call(method, spec, spec.original_len * factor))[0] == 1 == inv_freq(spec)[0]


def test_written_keys():
    assert call("linear", TINY, 1024).scaling == {"rope_type": "linear", "factor": 4.0}
    assert call("yarn", TINY, 1024).scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert call("yarn", TINY, 1024, beta_fast=8, beta_slow=2, attention_factor=1,
                truncate=False).scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
        "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
        # for readers that know the multiplier of their own number alone
        "attention_factor": 1.0, "attn_factor": 1 / (0.1 * math.log(4) + 1)}
    assert call("yarn", TINY, 1024, attention_factor=0.1 * math.log(4) + 1) == call(
        "yarn", TINY, 1024)
    assert call("yarn", TINY, 1024, mscale=0.5, mscale_all_dim=1).scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
        "mscale": 0.5, "mscale_all_dim": 1.0}
    by_parts = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    assert call("ntk-by-parts", TINY, 1024).scaling == by_parts
    assert call("llama3", TINY, 1024).scaling == by_parts
    assert call("proportional", TINY, 1024, partial_rotary_factor=0.25).scaling == {
        "rope_type": "proportional", "partial_rotary_factor": 0.25}
    assert call("proportional", TINY, 1024, partial_rotary_factor=0.25, factor=4).scaling == {
        "rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 4.0}
    for method in NEW_THETA:
        assert call(method, TINY, 1024).scaling == {}


def test_factors_that_were_found_for_a_length_are_carried_on():
    """By what they would be if the extension that they were found for were repeated."""
    found = {"long_factor": [1.0] + [2.0] * (len(inv_freq(TINY)) - 2) + [8.0],
             "attention_factor": 1.1}
    native = TINY.original_len
    there = call("longrope", TINY, 8 * native, **found)
    assert call("longrope", TINY, 8 * native, **found, found_for=8 * native) == there
    far = call("longrope", TINY, 64 * native, **found, found_for=8 * native).scaling
    assert far["long_factor"] == pytest.approx([1.0] + [4.0] * (len(inv_freq(TINY)) - 2) + [64.0])
    assert far["attention_factor"] == pytest.approx(1.2)
    assert call("longrope", TINY, native, **found, found_for=8 * native) == TINY
    for changes, said in (({"found_for": native}, "not above the model's native length"),
                          ({"found_for": "long"}, "found_for: 'long' is not a length"),
                          ({"found_for": native + 8, "long_factor": found["long_factor"]},
                           "factors of 1 to 8 reach e to the"),
                          ({"found_for": 2 * native, "attention_factor": 0.5},
                           "attention_factor 0.5 becomes -0.5"),
                          ({"found_for": "1m", "short_factor": found["long_factor"]},
                           "found_for carries one list on")):
        with pytest.raises(RecipeError, match=said):
            call("longrope", TINY, 8 * native, **{**found, **changes})


def test_written_keys_of_longrope():
    long, short = [1, 1, 1, 1, 2, 3, 4, 4], [1] * 8
    # One list: a model of the target length, to which nobody adds an attention factor.
    one = call("longrope", TINY, 1024, long_factor=long)
    assert one.original_len == 1024
    assert one.scaling == {
        "rope_type": "longrope", "factor": 1.0, "short_factor": long, "long_factor": long,
        "attention_factor": 1.0, "original_max_position_embeddings": 1024}
    assert call("longrope", TINY, 1024, long_factor=long, short_factor=list(long)) == one
    two = call("longrope", TINY, 1024, long_factor=long, short_factor=short, attention_factor=1.5)
    assert two.original_len == 256
    assert two.scaling == {
        "rope_type": "longrope", "factor": 4.0, "short_factor": short, "long_factor": long,
        "attention_factor": 1.5, "short_mscale": 1.5, "long_mscale": 1.5,
        "original_max_position_embeddings": 256}
    # With two lists vLLM and SGLang take a factor from the lengths unless told another.
    lists = {"long_factor": long, "short_factor": short}
    assert call("longrope", TINY, 1024, **lists).scaling["long_mscale"] == 1.0
    usual = math.sqrt(1 + math.log(4) / math.log(256))
    assert "long_mscale" not in call("longrope", TINY, 1024, **lists,
                                     attention_factor=usual).scaling


@pytest.mark.parametrize("method", ANY_BASE)
@pytest.mark.parametrize("spec", BASES, ids=lambda s: f"{s.rotary_dim}-{s.rope_theta:.0f}")
def test_native_length_is_the_identity(method, spec):
    assert call(method, spec, spec.original_len) == spec


@pytest.mark.parametrize("method", ANY_BASE)
@pytest.mark.parametrize("spec", BASES, ids=lambda s: f"{s.rotary_dim}-{s.rope_theta:.0f}")
@pytest.mark.parametrize("factor", [1.001, 1.5, 2, 16, 512])
def test_frequencies_are_sane(method, spec, factor):
    new = call(method, spec, int(spec.original_len * factor))
    before, after = inv_freq(spec), inv_freq(new)
    assert after.dtype == torch.float64
    assert after.shape == (spec.rotary_dim // 2,)
    assert torch.isfinite(after).all()
    assert (after >= 0).all() if method == STILL else (after > 0).all()
    assert (after.diff() <= 0).all(), "a later pair turns faster"
    assert (after <= before * (1 + 1e-12)).all(), "a pair turns faster than before"
    assert attention_factor(new) >= 1
    assert new.rotary_dim == spec.rotary_dim
    if method != "linear":
        assert after[0] == before[0] == 1


@pytest.mark.parametrize("method", ANY_BASE)
def test_too_short_a_target(method):
    with pytest.raises(RecipeError, match=r"target length 8191 .* native length 8192, a factor be"):
        call(method, LLAMA3, 8191)


@pytest.mark.parametrize("method", WRITTEN)
@pytest.mark.parametrize(("first", "told"), [
    ("linear", "'linear' from 8192 to 16384 tokens"), ("yarn", "'yarn' from 8192 to 16384 tokens"),
    ("ntk-by-parts", "'llama3' from 8192 to 16384 tokens"),
    ("longrope", "'longrope' for 16384 tokens")])
def test_a_model_that_is_extended_already(method, first, told):
    scaled = call(first, LLAMA3, 16384)
    with pytest.raises(CompatibilityError, match=f"extended already: rope_type {told}.*--from"):
        apply_method(method, scaled, 32768, options_for(method, LLAMA3))


def test_dynamic_is_not_written():
    with pytest.raises(RecipeError, match="dynamic is read but not written: it has other"):
        call("dynamic", LLAMA3, 16384)


@pytest.mark.parametrize("method", METHODS)
def test_options_are_keyword_only_and_documented(method):
    kinds = [p.kind for p in inspect.signature(METHODS[method]).parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert set(kinds[2:]) <= {inspect.Parameter.KEYWORD_ONLY}
    assert METHODS[method].__doc__


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_resonance(method):
    check_method(method, {**options_for(method, LLAMA3), "resonance": True})
    with pytest.raises(RecipeError, match="resonance must be true or false, not 'yes'"):
        check_method(method, {**options_for(method, LLAMA3), "resonance": "yes"})


LISTS = {"long_factor": [1.0] * 64}


@pytest.mark.parametrize(("method", "options", "message"), [
    ("crtical", {}, "unknown 'crtical'; did you mean 'critical'?"),
    ("ntk", {"factor": 2}, "method ntk: unknown option 'factor'; it accepts no options"),
    ("yarn", {"beta_fats": 2}, "unknown option 'beta_fats'; did you mean 'beta_fast'?"),
    ("theta", {}, "method theta: missing option rope_theta"),
    ("theta", {"rope_theta": 1}, "rope_theta must be a finite number above 1, not 1"),
    ("theta", {"rope_theta": math.inf}, "rope_theta must be a finite number above 1, not inf"),
    ("theta", {"rope_theta": math.nan}, "rope_theta must be a finite number above 1, not nan"),
    ("theta", {"rope_theta": "big"}, "rope_theta must be a finite number above 1, not 'big'"),
    ("yarn", {"beta_fast": 1.0}, "beta_fast must be a finite number above 1.0, not 1.0"),
    ("yarn", {"beta_slow": 0}, "beta_slow must be a finite number above 0, not 0"),
    ("yarn", {"attention_factor": -1}, "attention_factor must be a finite number above 0, not -1"),
    ("yarn", {"truncate": "no"}, "truncate must be true or false, not 'no'"),
    ("yarn", {"mscale": 1}, "mscale and mscale_all_dim together, not mscale 1"),
    ("yarn", {"mscale": 1, "mscale_all_dim": 2, "attention_factor": 3},
     "together, not attention_factor 3, mscale 1, mscale_all_dim 2"),
    ("ntk-by-parts", {"low_freq_factor": 5}, "high_freq_factor must be a finite number above 5"),
    ("gradient-v1", {"factor": 0}, "factor must be a finite number above 0, not 0"),
    ("longrope", {}, "method longrope: missing option long_factor"),
    ("longrope", {"long_factor": [1.0] * 8}, "list of 64 numbers, one for each pair of the 128 "
                                             "rotated channels, not a list of 8"),
    ("longrope", {"long_factor": "1,2"}, "rotated channels, not '1,2'"),
    ("longrope", {"long_factor": 2.0}, "rotated channels, not 2.0"),
    ("longrope", {"long_factor": [1.0] * 63 + [0]}, "long_factor[63] must be a finite number"),
    ("longrope", {**LISTS, "short_factor": [1.0]}, "short_factor must be a list of 64 numbers"),
    ("longrope", {**LISTS, "attention_factor": 0}, "attention_factor must be a finite number"),
    ("proportional", {}, "missing option partial_rotary_factor"),
    ("proportional", {"partial_rotary_factor": 0}, "partial_rotary_factor must be a finite number"),
    ("proportional", {"partial_rotary_factor": 1.5}, "must be at most 1 and factor at least 1, not "
                                                     "1.5 and 1.0"),
    ("proportional", {"partial_rotary_factor": 0.5, "factor": 0.5}, "not 0.5 and 0.5"),
    ("proportional", {"partial_rotary_factor": 0.5, "resonance": True}, "some pairs of this RoPE "
                                                                        "do not turn"),
    ("longrope", {**LISTS, "short_factor": [2.0] * 64, "resonance": True}, "leave short_factor "
                                                                           "out"),
])
def test_wrong_options(method, options, message):
    with pytest.raises(RecipeError) as caught:
        apply_method(method, LLAMA3, 16384, options)
    assert message in str(caught.value)


def test_too_small_a_share():
    with pytest.raises(CompatibilityError, match=r"0\.01 leaves none of 64 pairs turning"):
        call("proportional", LLAMA3, 16384, partial_rotary_factor=0.01)


@pytest.mark.parametrize(("method", "theta", "length"), [("critical", 1e4, 7), ("ntk", 1e307, 256),
                                                        ("gradient-v1", 1e307, 256)])
def test_a_theta_beyond_all_numbers_is_refused(method, theta, length):
    spec = RopeSpec(rope_theta=theta, rotary_dim=4, original_len=length)
    with pytest.raises(CompatibilityError, match=f"method {method} leaves the range of numbers "
                                                 f"from theta .* and {length} tokens to 2097152"):
        apply_method(method, spec, 1 << 21, {})
