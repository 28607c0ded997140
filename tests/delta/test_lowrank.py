"""Against torch's decomposition of the whole product."""

import pytest
import torch

from extend.delta.lowrank import Product, product_values, squared_distance, truncate


def random_product(out: int, rank: int, inner: int, seed: int = 0) -> Product:
    generator = torch.Generator().manual_seed(seed)
    return Product(torch.randn(rank, inner, generator=generator),
                   torch.randn(out, rank, generator=generator))


def dense(product: Product) -> torch.Tensor:
    return product.lora_b.double() @ product.lora_a.double()


@pytest.mark.parametrize("out, rank, inner", [(40, 8, 24), (24, 8, 40), (6, 9, 40), (40, 1, 3)])
def test_values_are_those_of_the_product(out, rank, inner):
    product = random_product(out, rank, inner)
    expected = torch.linalg.svdvals(dense(product))[:min(out, rank, inner)]
    torch.testing.assert_close(product_values(product), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out, rank, inner", [(40, 8, 24), (24, 8, 40), (6, 9, 40)])
def test_truncation_is_the_nearest_matrix_and_splits_evenly(out, rank, inner):
    product = random_product(out, rank, inner)
    u, s, vh = torch.linalg.svd(dense(product), full_matrices=False)
    found = truncate(product, 3)
    torch.testing.assert_close(dense(found), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-11, atol=1e-11)
    for factor, dim in ((found.lora_a, 1), (found.lora_b, 0)):
        torch.testing.assert_close(torch.linalg.vector_norm(factor, dim=dim), s[:3].sqrt())
    smaller = truncate(product, 2)
    torch.testing.assert_close(dense(Product(found.lora_a[:2], found.lora_b[:, :2])),
                               dense(smaller), rtol=1e-11, atol=1e-11)


def test_a_product_of_zeros_stays_one():
    found = truncate(Product(torch.randn(4, 9), torch.zeros(7, 4)), 2)
    torch.testing.assert_close(dense(found), torch.zeros(7, 9).double(), rtol=0, atol=0)


def test_distance_is_that_of_the_products():
    one, other = random_product(30, 8, 20), random_product(30, 5, 20, seed=1)
    expected = float((dense(one) - dense(other)).square().sum())
    assert squared_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert squared_distance(one, one) == pytest.approx(0.0, abs=1e-10)
    near = truncate(one, 7)
    assert squared_distance(one, near) == pytest.approx(float(product_values(one)[7] ** 2),
                                                        rel=1e-9)
