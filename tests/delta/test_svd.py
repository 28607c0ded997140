"""The truncated SVD against torch's full one, in fp64."""

import pytest
import torch

from extend.delta import svd
from extend.delta.svd import (
    factorize_to_edge,
    factorize_to_energy,
    factorize_to_rank,
    frobenius_squared,
    tensor_generator,
)

INDEX = torch.arange(1, 301, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(300, dtype=torch.float64),
    "slow": INDEX ** -0.5,
    "fast": torch.exp(-INDEX / 20),
    "signal_in_noise": 1 + 5 * torch.exp(-INDEX / 10),
    "rank_8": torch.cat([torch.linspace(2, 1, 8, dtype=torch.float64), torch.zeros(292)]),
}


def matrix(spectrum: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix with exactly these singular values (to fp32 rounding)."""
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(rows, len(spectrum), generator=generator, dtype=torch.float64)
    right = torch.randn(columns, len(spectrum), generator=generator, dtype=torch.float64)
    return ((torch.linalg.qr(left).Q * spectrum) @ torch.linalg.qr(right).Q.T).float()


def residual(delta: torch.Tensor, factors) -> float:
    return float(torch.linalg.norm(delta.double()
                                   - factors.lora_b.double() @ factors.lora_a.double()))


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    """Gaussian, 320 x 512: the spectrum that gives a sketch the least to hold on to."""
    return torch.randn(320, 512, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [1, 4, 16, 64, 200])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
def test_residual_is_within_half_a_percent_of_the_optimum(name, rank, shape):
    delta = matrix(SPECTRA[name], *shape)
    factors = factorize_to_rank(delta, rank, tensor_generator("w", 0))
    assert factors.lora_a.shape == (rank, shape[1])
    assert factors.lora_b.shape == (shape[0], rank)
    best = float(torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt())
    # The second term is the rounding of fp32 factors, for spectra that end before `rank`.
    assert residual(delta, factors) <= 1.005 * best + 2e-6 * float(torch.linalg.norm(delta))


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_residual_of_noise(noise, rank):
    factors = factorize_to_rank(noise, rank, tensor_generator("w", 0))
    best = float(torch.linalg.svdvals(noise.double())[rank:].square().sum().sqrt())
    assert residual(noise, factors) <= 1.005 * best


@pytest.mark.parametrize("levels", [(40, 260), (150, 150), (20, 60, 220)])
def test_residual_of_values_that_come_in_multitudes(levels):
    """A block of 32 sees no more than 32 directions of one value before its space is exhausted."""
    spectrum = torch.cat([torch.full((n,), 4.0 ** -i) for i, n in enumerate(levels)]).double()
    delta = matrix(spectrum, 300, 420)
    factors = factorize_to_rank(delta, 64, tensor_generator("w", 0))
    best = float(spectrum[64:].square().sum().sqrt())
    assert residual(delta, factors) <= 1.005 * best


def test_product_is_the_projection_that_torch_finds():
    spectrum = SPECTRA["fast"] * torch.where(INDEX <= 24, 1.0, 0.02)
    delta = matrix(spectrum, 300, 420)
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    factors = factorize_to_rank(delta, 24, tensor_generator("w", 0))
    expected = (u[:, :24] * s[:24]) @ vh[:24]
    # Behind the gap the sketch is exact, so what is left is fp32 rounding.
    torch.testing.assert_close(factors.lora_b @ factors.lora_a, expected.float(),
                               rtol=0, atol=1e-6 * float(s[0]))


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (1, 7), (40, 40)])
def test_full_rank_gives_the_delta_back(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    factors = factorize_to_rank(delta, max(shape), tensor_generator("w", 0))
    assert factors.lora_a.shape[0] == min(shape)
    # Sums of at most 60 fp32 products of size one.
    torch.testing.assert_close(factors.lora_b @ factors.lora_a, delta, rtol=0, atol=1e-5)
    assert factors.energy == pytest.approx(1, abs=1e-6)


def test_singular_values_are_shared_evenly():
    delta = matrix(SPECTRA["slow"], 300, 420)
    factors = factorize_to_rank(delta, 16, tensor_generator("w", 0))
    values = torch.linalg.svdvals(delta.double())[:16].sqrt().float()
    # 1e-3: how far the sketch's own singular values may be from the exact ones.
    torch.testing.assert_close(torch.linalg.norm(factors.lora_a, dim=1), values, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.linalg.norm(factors.lora_b, dim=0), values, rtol=1e-3, atol=0)


def test_same_seed_and_name_give_the_same_bits(noise):
    first = factorize_to_rank(noise, 16, tensor_generator("w", 3))
    torch.randn(100)  # the global generator must not matter
    again = factorize_to_rank(noise, 16, tensor_generator("w", 3))
    assert torch.equal(first.lora_a, again.lora_a)
    assert torch.equal(first.lora_b, again.lora_b)


@pytest.mark.parametrize(("name", "seed"), [("v", 3), ("w", 4)])
def test_another_name_or_seed_draws_another_sketch(name, seed):
    first = torch.randn(8, generator=tensor_generator("w", 3))
    assert not torch.equal(first, torch.randn(8, generator=tensor_generator(name, seed)))


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("name", SPECTRA)
def test_energy_takes_the_fewest_ranks(name, energy):
    delta = matrix(SPECTRA[name], 300, 420)
    squares = torch.linalg.svdvals(delta.double()).square()
    share = squares.cumsum(0) / squares.sum()
    exact = int((share >= min(energy, 1 - 1e-12)).int().argmax()) + 1
    factors = factorize_to_energy(delta, energy, tensor_generator("w", 0))
    rank = factors.lora_a.shape[0]
    # The sketch sees slightly too little of each value, so it may take one rank in twenty more.
    # In the rank-8 matrix, energy 1 is decided among rounding errors of fp32.
    slack = 292 if (name, energy) == ("rank_8", 1.0) else 1 + exact // 20
    assert exact <= rank <= exact + slack
    kept = 1 - (residual(delta, factors) / float(torch.linalg.norm(delta.double()))) ** 2
    assert kept >= energy - 1e-6  # fp32 rounding of the factors
    assert factors.energy == pytest.approx(kept, abs=1e-5)


def test_energy_grows_the_sketch():
    """A 700-row matrix whose answer, rank 96, is beyond the first sketch but not near full rank."""
    spectrum = torch.cat([torch.ones(96), torch.full((604,), 1e-3)]).double()
    delta = matrix(spectrum, 700, 720)
    factors = factorize_to_energy(delta, 0.999, tensor_generator("w", 0))
    assert factors.lora_a.shape[0] == 96


def test_zero_rows_stay_zero():
    delta = torch.zeros(40, 30)
    delta[3, 7] = 2.0
    factors = factorize_to_rank(delta, 5, tensor_generator("w", 0))
    assert bool(torch.isfinite(factors.lora_a).all() and torch.isfinite(factors.lora_b).all())
    torch.testing.assert_close(factors.lora_b @ factors.lora_a, delta)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("exact", [False, True])
def test_edge_counts_the_values_above_it(shape, exact):
    """40 values of at least 2, the rest at most 1, and an edge between them."""
    spectrum = torch.where(INDEX <= 40, 2 + 40 / INDEX, 1.0)
    factors = factorize_to_edge(matrix(spectrum, *shape), 1.5, 512, tensor_generator("w", 0),
                                exact=exact)
    assert factors.lora_a.shape == (40, shape[1])
    assert factors.lora_b.shape == (shape[0], 40)


def test_edge_grows_the_sketch_until_it_is_reached():
    spectrum = torch.cat([torch.full((150,), 2.0), torch.full((550,), 0.1)]).double()
    delta = matrix(spectrum, 700, 720)
    assert len(factorize_to_edge(delta, 1.0, 512, tensor_generator("w", 0)).values) == 150
    assert len(factorize_to_edge(delta, 1.0, 100, tensor_generator("w", 0)).values) == 100


def test_edge_does_not_decompose_the_whole_matrix(monkeypatch):
    spectrum = torch.cat([torch.full((20,), 2.0), torch.full((280,), 0.1)]).double()
    delta = matrix(spectrum, 300, 420)
    sizes = []
    original = svd._eigh
    monkeypatch.setattr(svd, "_eigh", lambda x: sizes.append(x.shape[0]) or original(x))
    assert len(factorize_to_edge(delta, 1.0, 512, tensor_generator("w", 0)).values) == 20
    assert sizes == [128]  # four blocks, each of half of the 64 ranks that are looked for


@pytest.mark.parametrize(("edge", "expected"), [(1e9, 1), (0.0, 300)])
def test_edge_above_and_below_everything(edge, expected):
    delta = matrix(SPECTRA["slow"], 300, 420)
    factors = factorize_to_edge(delta, edge, 512, tensor_generator("w", 0))
    assert len(factors.values) == expected


@pytest.mark.parametrize("exact", [False, True])
def test_slices_are_the_smaller_ranks(exact):
    delta = matrix(SPECTRA["slow"], 300, 420)
    norm = float(torch.linalg.norm(delta.double()))
    values = torch.linalg.svdvals(delta.double())
    factors = factorize_to_rank(delta, 64, tensor_generator("w", 0), exact=exact)
    for rank in (1, 8, 40, 64, 100):
        cut = factors.cut(rank)
        best = float(values[min(rank, 64):].square().sum().sqrt())
        assert len(cut.values) == min(rank, 64)
        assert residual(delta, cut) <= 1.005 * best
        # energy from the values alone; the residual from the factors
        assert cut.energy == pytest.approx(1 - (residual(delta, cut) / norm) ** 2, abs=1e-6)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
def test_exact_reaches_the_optimum(shape, monkeypatch):
    delta = matrix(SPECTRA["slow"], *shape)
    monkeypatch.setattr(svd, "_Krylov", None)  # must not be called
    factors = factorize_to_rank(delta, 16, tensor_generator("w", 0), exact=True)
    best = torch.linalg.svdvals(delta.double())
    assert residual(delta, factors) == pytest.approx(float(best[16:].square().sum().sqrt()),
                                                     rel=1e-6)
    # fp32 products behind an fp64 decomposition
    torch.testing.assert_close(factors.values, best[:16].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(7,), (64, 37), (37, 64), (3, 5, 7), (1, 900), (0, 4), ()])
@pytest.mark.parametrize("transposed", [False, True])
def test_norm_by_blocks(shape, transposed, monkeypatch):
    monkeypatch.setattr(svd, "_NORM_BLOCK", 100)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.T if transposed and x.dim() == 2 else x
    assert frobenius_squared(x) == pytest.approx(float(x.double().square().sum()), rel=1e-14)
