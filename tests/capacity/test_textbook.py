"""Crossovers of tensor and sequence parallelism: closed forms, and by bisection on the formulas."""

import pytest

from extend.capacity.textbook import (
    LLAMA2_7B,
    Block,
    attention_crossover,
    attention_memory,
    mlp_crossover,
    mlp_memory,
)

D = LLAMA2_7B.hidden


def crossing(memory, whole: int, devices: int, batch: int) -> float:
    """The length from which on sequence parallelism takes less, found without the closed form."""
    low, high = 1.0, 2.0**30
    for _ in range(100):
        middle = (low + high) / 2
        tensor, sequence = (memory(LLAMA2_7B, middle, devices, parallel=parallel, batch=batch,
                                   whole=whole) for parallel in ("tensor", "sequence"))
        low, high = (low, middle) if sequence < tensor else (middle, high)
    return low


@pytest.mark.parametrize("devices", [2, 8, 64])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("whole", [1, 2, 4])
def test_crossovers_are_where_the_formulas_cross(devices, batch, whole):
    found = crossing(attention_memory, whole, devices, batch)
    assert found == pytest.approx(attention_crossover(LLAMA2_7B, batch=batch, whole=whole))
    found = crossing(mlp_memory, whole, devices, batch)
    assert found == pytest.approx(mlp_crossover(LLAMA2_7B, batch=batch, whole=whole))


def test_rule_of_thumb_for_llama_2():
    """8.1 D and 16 D, with the norm's input and output whole on every device."""
    assert attention_crossover(LLAMA2_7B) / D == pytest.approx(8.1, rel=0.02)
    assert mlp_crossover(LLAMA2_7B) / D == pytest.approx(16, rel=0.02)


def test_li_et_al():
    """Their table 2 says B L > 16 A Z for attention, table 1 B L > 32 H for an MLP of 4 H."""
    plain = Block(D, 32, 128, 4 * D, num_matrices=2)
    assert attention_crossover(plain, whole=1) == 16 * 32 * 128
    assert mlp_crossover(plain, whole=1) == 32 * D


def test_table_2():
    A, Z, H, B, L, N = 128, 32, 4096, 3, 1000, 8
    tensor = 16 * A * Z * H / N + 4 * B * L * Z * A / N + B * Z * L**2 / N + B * L * H
    sequence = 16 * A * Z * H + 4 * B * Z * L * A / N + B * Z * L**2 / N + B * L * H / N
    for parallel, expected in (("tensor", tensor), ("sequence", sequence)):
        assert attention_memory(LLAMA2_7B, L, N, parallel=parallel, batch=B) == expected
