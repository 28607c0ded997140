"""Exact algebra of low-rank products B A, without ever making the product.

With B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of the r x r matrix
R_B R_A^T, and its singular vectors give those of B A. This holds for factors of any kind, not only
for those that a decomposition left orthogonal. All of it is in fp64: factors are small.

Source: section 3 of Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), for a
matrix that is given as a product.
"""

from typing import NamedTuple

import torch


class Product(NamedTuple):
    """The matrix lora_b @ lora_a.

    Attributes:
        lora_a: [r, in].
        lora_b: [out, r].
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor


def product_values(product: Product) -> torch.Tensor:
    """The singular values of a product: [min(r, out, in)], fp64, falling."""
    right = torch.linalg.qr(product.lora_a.double().T, mode="r").R
    left = torch.linalg.qr(product.lora_b.double(), mode="r").R
    return torch.linalg.svdvals(left @ right.T)


def truncate(product: Product, rank: int) -> Product:
    """The nearest product of a smaller rank, fp64.

    Each factor has the square root of every singular value, in falling order, so that each smaller
    rank is a slice of it.

    Args:
        product: of at least that rank.
    """
    right = torch.linalg.qr(product.lora_a.double().T)
    left = torch.linalg.qr(product.lora_b.double())
    u, values, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    share = values[:rank].sqrt()
    return Product((share[:, None] * vh[:rank]) @ right.Q.T, (left.Q @ u[:, :rank]) * share)


def squared_distance(one: Product, other: Product) -> float:
    """||one - other||_F^2 of two products of equal shape.

    From inner products of r x r matrices; what cancels in fp64 is 1e-16 of the squared norms.
    """
    total = _inner(one, one) - 2 * _inner(one, other) + _inner(other, other)
    return max(0.0, total)


def _inner(one: Product, other: Product) -> float:
    """The sum of elementwise products: trace(A^T B^T B' A')."""
    left = one.lora_b.double().T @ other.lora_b.double()
    right = one.lora_a.double() @ other.lora_a.double().T
    return float((left * right).sum())
