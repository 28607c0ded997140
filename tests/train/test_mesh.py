"""How rows and ranks are dealt out."""

from dataclasses import replace

import pytest
import torch

from extend.errors import CompatibilityError, LayoutError, RecipeError
from extend.model_config import RopeSpec
from extend.train.mesh import (
    Processes,
    check_attention,
    check_schedule,
    phase_mesh,
    split_phase,
    split_world,
)
from extend.train.model import check_rope
from extend.train_options import Phase, TrainOptions


@pytest.mark.parametrize(("batch_rows", "world", "expected"), [
    (1, 1, (1, 1)), (1, 4, (1, 4)), (2, 4, (2, 2)), (4, 4, (4, 1)), (8, 4, (4, 1)),
    (3, 4, (1, 4)), (6, 4, (2, 2))])
def test_split_world(batch_rows: int, world: int, expected: tuple[int, int]):
    assert split_world(batch_rows, world) == expected


@pytest.mark.parametrize(("batch_rows", "world", "tp", "context_parallel", "expected"), [
    (16, 8, 1, 8, (1, 8)), (16, 8, 1, 4, (2, 4)), (3, 8, 1, 2, (1, 8)), (16, 4, 2, 2, (1, 2)),
    (16, 2, 1, 8, (1, 2)), (16, 1, 1, 8, (1, 1))])
def test_processes_share_rows_although_there_are_rows_for_each(batch_rows, world, tp,
                                                               context_parallel, expected):
    assert split_world(batch_rows, world, tp, context_parallel) == expected
    phase = Phase(length=64, steps=1, lr=1e-4, batch_rows=batch_rows,
                  context_parallel=context_parallel)
    assert split_phase(phase, world, tp) == expected
    check_schedule([phase], "zigzag", world, tp)


def test_context_parallel_divides_the_processes():
    phase = Phase(length=48, steps=1, lr=1e-4, batch_rows=6, context_parallel=4)
    with pytest.raises(LayoutError, match="context_parallel 4 does not divide 6 processes"):
        check_schedule([phase], "zigzag", 6)


def test_schedule_is_checked_per_phase():
    phases = [Phase(length=10, steps=1, lr=1e-4, batch_rows=4),
              Phase(length=10, steps=1, lr=1e-4, batch_rows=2)]
    check_schedule(phases[:1], "zigzag", 4)  # each process has whole rows
    with pytest.raises(LayoutError, match="length 10 must be a multiple of 2 x 2 ranks"):
        check_schedule(phases, "zigzag", 4)


def run_of(strategy: str, **changes: str) -> TrainOptions:
    phases = [Phase(length=64, steps=1, lr=1e-4, batch_rows=rows) for rows in (4, 2, 1)]
    return TrainOptions(model="m", data=[{"kind": "retrieval"}], schedule=phases,
                        strategy=strategy, **changes)


@pytest.mark.parametrize(("strategy", "num_heads", "match"), [
    ("ulysses", 6, r"phase 3: strategy 'ulysses' divides the 4 processes .* 6 query heads by 4"),
    ("ulysses", 3, r"phase 2: strategy 'ulysses' divides the 2 processes .* 3 query heads by 2"),
    ("usp:4", 8, r"phase 2: strategy 'usp:4' divides the 2 processes .* 8 query heads by 4"),
    ("double-ring:4", 8, r"phase 2: strategy 'double-ring:4' divides the 2 processes .* ring by 4"),
])
def test_a_strategy_must_fit_every_phase(strategy: str, num_heads: int, match: str):
    with pytest.raises(CompatibilityError, match=match):
        check_attention(run_of(strategy), num_heads, 4)


@pytest.mark.parametrize(("strategy", "num_heads"), [
    ("ulysses", 8), ("usp:2", 6), ("usp", 3), ("double-ring:2", 3), ("ring", 3), ("auto", 3)])
def test_strategies_that_fit(strategy: str, num_heads: int):
    check_attention(run_of(strategy), num_heads, 4)
    check_attention(run_of("usp:7"), num_heads, 1)  # one process needs no strategy


def test_kernels_are_looked_up_before_anything_runs():
    check_attention(run_of("auto", kernel="flash"), 8, 1)
    with pytest.raises(RecipeError, match="kernel: unknown 'flsh'; did you mean 'flash'"):
        check_attention(run_of("auto", kernel="flsh"), 8, 1)


def test_one_process_has_no_groups():
    alone = Processes(0, 1, torch.device("cpu"), None)
    mesh = phase_mesh(Phase(length=8, steps=1, lr=1e-4), alone)
    assert (mesh.dp, mesh.cp, mesh.ring) == (1, 1, None)


def test_rope_that_looks_at_positions_is_refused():
    spec = RopeSpec(rope_theta=1e4, rotary_dim=8, original_len=64,
                    scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(CompatibilityError, match="'dynamic' has other frequencies .* --from 64"):
        check_rope(spec, 1)
    two_lists = replace(spec, scaling={"rope_type": "longrope", "short_factor": [1.0] * 4,
                                       "long_factor": [2.0] * 4})
    check_rope(two_lists, 1)
    with pytest.raises(CompatibilityError, match="'longrope' .* ring of 2"):
        check_rope(two_lists, 2)
    check_rope(replace(two_lists, scaling={**two_lists.scaling, "short_factor": [2.0] * 4}), 2)
