"""Frequencies against values printed by other implementations (`published.json`)."""

import math

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
from tests.rope.test_methods import LLAMA2, LLAMA3, PUBLISHED, call

QWEN = RopeSpec(rope_theta=1e6, rotary_dim=128, original_len=32768)
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
                   scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(CompatibilityError, match=r"'dynamic' is not supported; choose one of def"):
        inv_freq(odd)
    bare = RopeSpec(rope_theta=1e4, rotary_dim=64, original_len=4096,
                    scaling={"rope_type": "llama3", "factor": 2.0})
    with pytest.raises(CompatibilityError, match="'llama3' lacks 'low_freq_factor'"):
        inv_freq(bare)
