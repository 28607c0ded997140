"""How rows and ranks are dealt out."""

import pytest
import torch

from extend.errors import CompatibilityError, LayoutError
from extend.model_config import RopeSpec
from extend.options import Phase
from extend.train.mesh import Processes, check_schedule, phase_mesh, split_world
from extend.train.model import check_rope


@pytest.mark.parametrize(("batch_rows", "world", "expected"), [
    (1, 1, (1, 1)), (1, 4, (1, 4)), (2, 4, (2, 2)), (4, 4, (4, 1)), (8, 4, (4, 1)),
    (3, 4, (1, 4)), (6, 4, (2, 2))])
def test_split_world(batch_rows: int, world: int, expected: tuple[int, int]):
    assert split_world(batch_rows, world) == expected


def test_schedule_is_checked_per_phase():
    phases = [Phase(length=10, steps=1, lr=1e-4, batch_rows=4),
              Phase(length=10, steps=1, lr=1e-4, batch_rows=2)]
    check_schedule(phases[:1], "zigzag", 4)  # each process has whole rows
    with pytest.raises(LayoutError, match="length 10 must be a multiple of 2 x 2 ranks"):
        check_schedule(phases, "zigzag", 4)


def test_one_process_has_no_groups():
    alone = Processes(0, 1, torch.device("cpu"), None)
    mesh = phase_mesh(Phase(length=8, steps=1, lr=1e-4), alone)
    assert (mesh.dp, mesh.cp, mesh.ring) == (1, 1, None)


def test_rope_that_looks_at_positions_is_refused_in_a_ring():
    spec = RopeSpec(rope_theta=1e4, rotary_dim=8, original_len=64,
                    scaling={"rope_type": "dynamic", "factor": 2.0})
    check_rope(spec, 1)
    with pytest.raises(CompatibilityError, match="'dynamic' .* ring of 2"):
        check_rope(spec, 2)
