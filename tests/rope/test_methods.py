"""Thetas against published models and closed forms, and what holds for every method.

`published.json` holds the configs of published long-context models and values that other
implementations print for them.
"""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec
from extend.rope import METHODS
from extend.rope.frequencies import attention_factor, critical_index, inv_freq
from extend.rope.methods import apply_method

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
LLAMA3 = RopeSpec(rope_theta=500_000.0, rotary_dim=128, original_len=8192)
LLAMA2 = RopeSpec(rope_theta=10_000.0, rotary_dim=128, original_len=4096)
SMALL = RopeSpec(rope_theta=100_000.0, rotary_dim=64, original_len=8192)
TINY = RopeSpec(rope_theta=10_000.0, rotary_dim=16, original_len=256)
REQUIRED = {"theta": {"rope_theta": 2e6}}
PLAIN = {"theta", "ntk", "critical", "gradient-v1", "gradient-v2"}


def call(method: str, spec: RopeSpec, target_len: int, **options) -> RopeSpec:
    return apply_method(method, spec, target_len, {**REQUIRED.get(method, {}), **options})


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
    assert thetas == [15296098, 207112184, 1062356830]


def test_gradient_v1_last_stage_started_from_the_uncut_value():
    uncut = 207112184 * (4 * 2 - 3) ** (128 / 126)
    before = RopeSpec(rope_theta=uncut, rotary_dim=128, original_len=524288)
    assert call("gradient-v1", before, 1048576, factor=1.6).rope_theta == 2804339835
    published = RopeSpec(rope_theta=1062356830, rotary_dim=128, original_len=524288)
    assert call("gradient-v1", published, 1048576, factor=1.6).rope_theta == 2804339833


@pytest.mark.parametrize(("length", "theta"), [
    (262144, 283461213), (1048576, 3580165449),
    (4194304, 45218125209)])  # the published 45218125210 is the same value rounded, not cut
def test_gradient_v2_is_exact(length, theta):
    assert call("gradient-v2", LLAMA3, length).rope_theta == theta


@pytest.mark.parametrize(("spec", "length", "key"), [
    (LLAMA3, 16384, "l3_16384"), (LLAMA2, 8192, "l2_8192"), (LLAMA2, 12288, "l2_12288"),
    (LLAMA2, 16384, "l2_16384"),
    (RopeSpec(rope_theta=1e6, rotary_dim=128, original_len=32768), 131072,
     "mistral_large_32k_128k_1e6")])
def test_critical_against_another_implementation(spec, length, key):
    exact, printed = PUBLISHED["koboldcpp_pr910"][key]
    theta = call("critical", spec, length).rope_theta
    assert theta == pytest.approx(exact, rel=1e-12)
    # The other implementation prints one decimal at most, sometimes none.
    assert theta == pytest.approx(printed, abs=1.0)


@pytest.mark.parametrize("method", ["critical", "ntk"])
def test_stages_compose(method):
    staged = LLAMA3
    for length in (20000, 65536, 300000, 1048576):
        staged = call(method, staged, length)
    once = call(method, LLAMA3, 1048576)
    assert staged.rope_theta == pytest.approx(once.rope_theta, rel=1e-12)
    assert staged.original_len == once.original_len == 1048576


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


def test_written_keys():
    assert call("linear", TINY, 1024).scaling == {"rope_type": "linear", "factor": 4.0}
    assert call("yarn", TINY, 1024).scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert call("yarn", TINY, 1024, beta_fast=8, beta_slow=2, attention_factor=1,
                truncate=False).scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
        "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.0, "truncate": False}
    assert call("ntk-by-parts", TINY, 1024).scaling == {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}
    for method in PLAIN:
        assert call(method, TINY, 1024).scaling == {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [LLAMA3, LLAMA2, SMALL, TINY], ids=lambda s: str(s.rotary_dim))
def test_native_length_is_the_identity(method, spec):
    options = {"rope_theta": spec.rope_theta} if method == "theta" else {}
    assert METHODS[method](spec, spec.original_len, **options) == spec


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [LLAMA3, LLAMA2, SMALL, TINY], ids=lambda s: str(s.rotary_dim))
@pytest.mark.parametrize("factor", [1.001, 1.5, 2, 16, 512])
def test_frequencies_are_sane(method, spec, factor):
    new = call(method, spec, int(spec.original_len * factor))
    before, after = inv_freq(spec), inv_freq(new)
    assert after.dtype == torch.float64
    assert after.shape == (spec.rotary_dim // 2,)
    assert torch.isfinite(after).all()
    assert (after > 0).all()
    assert (after.diff() <= 0).all(), "a later pair turns faster"
    assert (after <= before * (1 + 1e-12)).all(), "a pair turns faster than before"
    assert attention_factor(new) >= 1
    assert new.rotary_dim == spec.rotary_dim
    if method != "linear":
        assert after[0] == before[0] == 1


@pytest.mark.parametrize("method", METHODS)
def test_too_short_a_target(method):
    with pytest.raises(RecipeError, match=r"target length 8191 .* native length 8192"):
        call(method, LLAMA3, 8191)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", ["linear", "yarn", "ntk-by-parts"])
def test_a_scaled_model_is_refused(method, first):
    scaled = call(first, LLAMA3, 16384)
    with pytest.raises(CompatibilityError, match=scaled.rope_type):
        call(method, scaled, 32768)


@pytest.mark.parametrize("method", METHODS)
def test_options_are_keyword_only_and_documented(method):
    kinds = [p.kind for p in inspect.signature(METHODS[method]).parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert set(kinds[2:]) <= {inspect.Parameter.KEYWORD_ONLY}
    assert METHODS[method].__doc__


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
    ("ntk-by-parts", {"low_freq_factor": 5}, "high_freq_factor must be a finite number above 5"),
    ("gradient-v1", {"factor": 0}, "factor must be a finite number above 0, not 0"),
])
def test_wrong_options(method, options, message):
    with pytest.raises(RecipeError) as caught:
        apply_method(method, LLAMA3, 16384, options)
    assert message in str(caught.value)
