"""Rounding noise: the ulp of every dtype, and the edge against matrices that were rounded."""

import math

import pytest
import torch

from extend.delta.noise import rounding_noise

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [1.0, 1.75, 0.02, -3.0, 1e-3, 6e4])
def test_ulp_is_the_step_to_the_next_number(name, value):
    stored = torch.full((3, 5), value).to(DTYPES[name])
    bits = torch.int32 if name == "F32" else torch.int16
    following = (stored.view(bits) + 1).view(DTYPES[name])
    ulp = float((following.double() - stored.double()).abs()[0, 0])
    noise = rounding_noise(stored, stored, name)
    assert noise.sigma == pytest.approx(ulp / math.sqrt(12), rel=1e-12)
    assert noise.edge == pytest.approx(noise.sigma * (math.sqrt(3) + math.sqrt(5)), rel=1e-12)
    assert noise.energy == pytest.approx(15 * noise.sigma ** 2, rel=1e-12)


def test_values_of_both_models_count():
    one, four = torch.full((2, 2), 1.0), torch.full((2, 2), 4.0)
    both = rounding_noise(one, four, "BF16")
    assert both.sigma == pytest.approx(2.0 ** -7 * math.sqrt((1 + 16) / 2 / 12), rel=1e-12)


def test_subnormals_of_fp16_have_one_step():
    noise = rounding_noise(torch.full((2, 2), 3e-7), torch.zeros(2, 2), "F16")
    assert noise.sigma == pytest.approx(2.0 ** -24 / math.sqrt(12), rel=1e-12)


def test_fp64_counts_as_the_fp32_it_is_read_in():
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert rounding_noise(x, x, "F64") == rounding_noise(x.float(), x.float(), "F32")


def test_blocks_do_not_change_the_mean(monkeypatch):
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    whole = rounding_noise(x, x, "BF16")
    monkeypatch.setattr("extend.delta.noise._BLOCK", 5)
    assert rounding_noise(x, x, "BF16").sigma == pytest.approx(whole.sigma, rel=1e-12)


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_predicts_the_noise_of_a_rounded_model(name):
    generator = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(256, 384, generator=generator)).to(DTYPES[name]).float()
    trained = base + 2e-3 * torch.randn(256, 384, generator=generator)
    stored = trained.to(DTYPES[name])
    found = stored.double() - trained.double()
    noise = rounding_noise(base, stored, name)
    # The change is many ulps, so the errors are uniform; 98,304 of them fix sigma to 1 %, and
    # base and tuned differ a little in size.
    assert float(found.square().mean().sqrt()) == pytest.approx(noise.sigma, rel=0.02)
    largest = float(torch.linalg.svdvals(found)[0])
    assert 0.93 * noise.edge < largest < 1.02 * noise.edge
