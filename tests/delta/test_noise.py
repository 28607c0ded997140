"""Rounding noise: the ulp of every dtype, and the edge against matrices that were rounded."""

import math

import pytest
import torch

from extend.delta.noise import noise_edge, rounding_noise

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [1.0, 1.75, 0.02, -3.0, 1e-3, 6e4])
def test_ulp_is_the_step_to_the_next_number(name, value):
    stored = torch.full((3, 5), value).to(DTYPES[name])
    bits = torch.int32 if name == "F32" else torch.int16
    following = (stored.view(bits) + 1).view(DTYPES[name])
    ulp = float((following.double() - stored.double()).abs()[0, 0])
    noise = rounding_noise(stored, stored, name)
    assert noise.sigma == pytest.approx(ulp / math.sqrt(12), rel=1e-6)
    assert noise.edge == pytest.approx(noise.sigma * (math.sqrt(3) + math.sqrt(5)), rel=2e-5)
    assert noise.energy == pytest.approx(15 * noise.sigma ** 2, rel=1e-6)


def test_values_of_both_models_count():
    one, four = torch.full((2, 2), 1.0), torch.full((2, 2), 4.0)
    both = rounding_noise(one, four, "BF16")
    assert both.sigma == pytest.approx(2.0 ** -7 * math.sqrt((1 + 16) / 2 / 12), rel=1e-6)


def test_subnormals_of_fp16_have_one_step():
    noise = rounding_noise(torch.full((2, 2), 3e-7), torch.zeros(2, 2), "F16")
    assert noise.sigma == pytest.approx(2.0 ** -24 / math.sqrt(12), rel=1e-6)


def test_fp64_counts_as_the_fp32_it_is_read_in():
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert rounding_noise(x.float(), x.float(), "F64") == rounding_noise(x.float(), x.float(),
                                                                         "F32")


def test_blocks_do_not_change_the_mean(monkeypatch):
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    whole = rounding_noise(x, x, "BF16")
    monkeypatch.setattr("extend.delta.noise._BLOCK", {"cpu": 20})
    assert rounding_noise(x, x, "BF16") == pytest.approx(whole, rel=1e-6)


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


def profile(rows: float, columns: float, shape: tuple[int, int]) -> torch.Tensor:
    """Standard deviations a_i b_j with log-normal a and b of these spreads."""
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.exp(spread * torch.randn(n, generator=generator, dtype=torch.float64))
                   for spread, n in zip((rows, columns), shape, strict=True))
    return left[:, None] * right


@pytest.mark.parametrize("shape", [(192, 576), (576, 192), (400, 400)])
@pytest.mark.parametrize("spreads", [(0, 0), (0.2, 0.2), (0.5, 0), (0, 0.5), (0.5, 0.5)])
def test_edge_of_noise_of_uneven_size(spreads, shape):
    """Neither below what noise reaches nor far above; that of even noise is up to 3 times below."""
    sizes = profile(*spreads, shape)
    edge = noise_edge(sizes.square().sum(1), sizes.square().sum(0))
    generator = torch.Generator().manual_seed(5)
    largest = max(float(torch.linalg.svdvals(
        sizes * torch.randn(shape, generator=generator, dtype=torch.float64))[0]) for _ in range(4))
    # Of very uneven noise a few rows and columns decide, so that the largest of four draws varies.
    assert 0.93 * edge < largest < (1.05 if min(spreads) > 0.2 else 1.03) * edge


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_rounding_of_uneven_weights_stays_below_the_edge(name):
    generator = torch.Generator().manual_seed(6)
    sizes = 0.02 * profile(0.2, 0.2, (256, 384)).float()
    base = (sizes * torch.randn(256, 384, generator=generator)).to(DTYPES[name]).float()
    trained = base + 0.1 * sizes * torch.randn(256, 384, generator=generator)
    stored = trained.to(DTYPES[name]).float()
    values = torch.linalg.svdvals(stored.double() - trained.double())
    noise = rounding_noise(base, stored, name)
    assert 0.93 * noise.edge < float(values[0]) < 1.02 * noise.edge
    even = noise.sigma * (math.sqrt(256) + math.sqrt(384))
    assert int((values > even).sum()) >= 5  # ranks that would have gone to rounding


def test_edge_is_the_smallest_solution():
    """Against a search over t with every row and column of its own, solved by bisection."""
    sizes = profile(0.6, 0.9, (30, 50)).square()
    rows, columns = sizes.sum(1), sizes.sum(0)

    def solve(values, t):
        low, high = float(values.max()), float(values.max()) * (1 + len(values) / t)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = ((middle, high) if float((values / (middle - values)).sum()) > t
                         else (low, middle))
        return low
    total = rows.sum()
    best = min(t * solve(rows / total, t) * solve(columns / total, t)
               for t in torch.logspace(0, 2, 120, dtype=torch.float64).tolist())
    # The search's own step of 4 %, and groups of two columns here.
    assert noise_edge(rows, columns) == pytest.approx(float(best * total) ** 0.5, rel=1e-3)


def test_zeros_have_no_noise_edge():
    assert noise_edge(torch.zeros(3, dtype=torch.float64),
                      torch.zeros(4, dtype=torch.float64)) == 0.0
