"""Frequencies against values printed by other implementations (`published.json`)."""

import math
from dataclasses import replace

import pytest
import torch

from extend.errors import CompatibilityError
from extend.model_config import RopeSpec
from extend.rope.frequencies import (
    attention_factor,
    critical_index,
    inv_freq,
    turns,
    wavelengths,
    yarn_ramp,
)
from tests.rope.specs import LLAMA2, LLAMA3, PUBLISHED, QWEN, TINY, call

YARN = {"llama2_4k_x16": call("yarn", LLAMA2, 65536),
        "llama3_8k_x4": call("yarn", LLAMA3, 32768),
        "llama3_8k_x16": call("yarn", LLAMA3, 131072),
        "llama3_8k_x128_ultralong(beta4,1)": call("yarn", LLAMA3, 1048576, beta_fast=4),
        "qwen_32k_x4": call("yarn", QWEN, 131072)}
CRITICAL = {"llama2_4k": LLAMA2, "llama3_8k": LLAMA3, "qwen2.5_32k": QWEN,
            "llama3.2_1b_d64": RopeSpec(rope_theta=5e5, rotary_dim=64, original_len=8192),
            "phi3mini_2k_d96": RopeSpec(rope_theta=1e4, rotary_dim=96, original_len=2048),
            "mistral_8k": RopeSpec(rope_theta=1e4, rotary_dim=128, original_len=8192)}


def check_entries(found: torch.Tensor, expected: dict[str, float]) -> None:
    """Compare the listed entries; both sides are fp64 up to the order of a few operations."""
    index = torch.tensor([int(i) for i in expected])
    torch.testing.assert_close(found[index],
                               torch.tensor(list(expected.values()), dtype=torch.float64),
                               rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PUBLISHED["yarn"])
def test_yarn(name):
    expected, spec = PUBLISHED["yarn"][name], YARN[name]
    assert yarn_ramp(spec) == (expected["low"], expected["high"])
    assert attention_factor(spec) == pytest.approx(expected["mscale"], rel=1e-14)
    check_entries(inv_freq(spec), expected["inv_freq"])


@pytest.mark.parametrize("factor", PUBLISHED["yarn_mscale"])
def test_yarn_attention_factor(factor):
    spec = call("yarn", LLAMA3, 8192 * int(factor))
    assert attention_factor(spec) == pytest.approx(PUBLISHED["yarn_mscale"][factor], rel=1e-14)


def test_yarn_attention_factor_given_or_by_two_scales():
    assert attention_factor(call("yarn", LLAMA3, 32768, attention_factor=1.25)) == 1.25
    scaling = {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0}
    spec = RopeSpec(rope_theta=1e4, rotary_dim=64, original_len=4096, scaling=scaling)
    expected = (0.1 * 0.707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert attention_factor(spec) == pytest.approx(expected, rel=1e-14)
    assert attention_factor(LLAMA3) == attention_factor(call("ntk-by-parts", LLAMA3, 65536)) == 1.0


def test_llama3_x8():
    expected = PUBLISHED["llama3_rope_x8"]
    spec = call("ntk-by-parts", LLAMA3, 65536)
    check_entries(inv_freq(spec), expected["inv_freq"])
    check_ratios(LLAMA3, spec, expected)


def test_llama32_1b_x32():
    base = CRITICAL["llama3.2_1b_d64"]
    check_ratios(base, call("ntk-by-parts", base, 8192 * 32), PUBLISHED["llama3.2_1b_d64_x32"])


def check_ratios(base: RopeSpec, spec: RopeSpec, expected: dict) -> None:
    ratio = inv_freq(base) / inv_freq(spec)
    check_entries(ratio, expected["ratio"])
    last, first = expected["unscaled_last"], expected["scaled_first"]
    assert (ratio[:last + 1] == 1).all()
    torch.testing.assert_close(ratio[first:], torch.full_like(ratio[first:],
                                                              spec.scaling["factor"]))
    assert ratio[last + 1] > 1
    assert ratio[first - 1] < spec.scaling["factor"]


@pytest.mark.parametrize("name", PUBLISHED["crit_dim"])
def test_critical_dimension(name):
    real, dimension = PUBLISHED["crit_dim"][name]
    assert critical_index(CRITICAL[name]) == pytest.approx(real, rel=1e-12)
    assert 2 * math.ceil(critical_index(CRITICAL[name])) == dimension


@pytest.mark.parametrize("row", PUBLISHED["coverage"], ids=lambda r: r["name"])
def test_coverage_of_published_models(row):
    spec = RopeSpec(rope_theta=row["base"], rotary_dim=128, original_len=row["L"])
    assert critical_index(spec) == pytest.approx(row["crit_real"], rel=1e-12)
    assert wavelengths(spec)[-1].item() == pytest.approx(row["longest_wavelength"], rel=1e-12)
    assert int((turns(spec) >= 1).sum()) == row["pairs_full_period"]
    torch.testing.assert_close(turns(spec, 2 * row["L"]), 2 * turns(spec), rtol=1e-15, atol=0)


def test_unknown_type_and_missing_key():
    odd = RopeSpec(rope_theta=1e4, rotary_dim=64, original_len=4096,
                   scaling={"rope_type": "xdrope", "factor": 2.0})
    with pytest.raises(CompatibilityError, match=r"'xdrope' is not supported; choose one of def"):
        inv_freq(odd)
    bare = RopeSpec(rope_theta=1e4, rotary_dim=64, original_len=4096,
                    scaling={"rope_type": "llama3", "factor": 2.0})
    with pytest.raises(CompatibilityError, match="'llama3' lacks 'low_freq_factor'"):
        inv_freq(bare)


# --- dynamic ---

DYNAMIC = replace(LLAMA3, scaling={"rope_type": "dynamic", "factor": 4.0})


@pytest.mark.parametrize("row", PUBLISHED["llama3_8k_theta"], ids=lambda r: str(r["T"]))
def test_dynamic_at_a_length(row):
    for factor, key in ((4.0, "dyn_f4_oneshot"), (row["s"], "dyn_f_eq_s")):
        spec = replace(DYNAMIC, scaling={"rope_type": "dynamic", "factor": factor})
        expected = inv_freq(replace(LLAMA3, rope_theta=row[key]))
        torch.testing.assert_close(inv_freq(spec, row["T"]), expected, rtol=1e-12, atol=0)


def test_dynamic_is_plain_up_to_the_native_length():
    for length in (1, 4096, 8192):
        assert torch.equal(inv_freq(DYNAMIC, length), inv_freq(LLAMA3))
    assert torch.equal(inv_freq(DYNAMIC), inv_freq(DYNAMIC, 4 * 8192))
    assert attention_factor(DYNAMIC) == 1


def test_dynamic_with_factor_one_is_ntk():
    spec = replace(DYNAMIC, scaling={"rope_type": "dynamic", "factor": 1.0})
    torch.testing.assert_close(inv_freq(spec, 65536), inv_freq(call("ntk", LLAMA3, 65536)),
                               rtol=1e-12, atol=0)


# --- longrope ---

@pytest.mark.parametrize(("native", "factor", "key"), [
    (4096, 32, "phi3_4k_x32"), (8192, 16, "8k_x16"), (8192, 128, "8k_x128")])
def test_longrope_attention_factor(native, factor, key):
    spec = RopeSpec(rope_theta=1e4, rotary_dim=4, original_len=native, scaling={
        "rope_type": "longrope", "factor": factor, "short_factor": [1, 1], "long_factor": [1, 9]})
    assert attention_factor(spec) == pytest.approx(PUBLISHED["longrope_attn"][key], rel=1e-14)


def test_longrope_changes_over_after_the_native_length():
    short, long = [1.0] * 8, [float(i) for i in range(1, 9)]
    spec = call("longrope", TINY, 1024, long_factor=long, short_factor=short)
    plain = inv_freq(TINY)
    assert torch.equal(inv_freq(spec, 256), plain)
    torch.testing.assert_close(inv_freq(spec, 257), plain / torch.arange(1, 9), rtol=1e-15, atol=0)
    assert torch.equal(inv_freq(spec), inv_freq(spec, 257))
    assert spec.depends_on_length
    assert spec.scaling["attention_factor"] == attention_factor(spec) == 1


# --- proportional ---

@pytest.mark.parametrize(("share", "turning"), [(0.25, 16), (0.5, 32), (0.999, 63), (1.0, 64)])
def test_proportional_keeps_the_fastest_pairs(share, turning):
    spec = call("proportional", LLAMA3, 131072, partial_rotary_factor=share, factor=2)
    found = inv_freq(spec)
    assert torch.equal(found[turning:], torch.zeros(64 - turning, dtype=torch.float64))
    torch.testing.assert_close(found[:turning] * 2, inv_freq(LLAMA3)[:turning], rtol=1e-15, atol=0)
    assert wavelengths(spec)[turning:].isinf().all()


# --- resonance ---

@pytest.mark.parametrize("method", ["linear", "ntk", "critical", "ntk-by-parts", "yarn", "longrope",
                                    "theta", "gradient-v2", "prolong"])
def test_resonance_rounds_every_wavelength(method):
    plain = call(method, LLAMA3, 65536)
    spec = call(method, LLAMA3, 65536, resonance=True)
    torch.testing.assert_close(wavelengths(spec), wavelengths(plain).round(), rtol=1e-14, atol=0)
    assert attention_factor(spec) == attention_factor(plain)
    assert not spec.depends_on_length
    assert spec.rope_theta == plain.rope_theta


def test_resonance_of_plain_rope():
    spec = call("critical", TINY, 256, resonance=True)
    expected = (2 * math.pi / inv_freq(TINY)).round()
    torch.testing.assert_close(wavelengths(spec), expected, rtol=1e-14, atol=0)
    assert expected.tolist()[:3] == [6, 20, 63]
