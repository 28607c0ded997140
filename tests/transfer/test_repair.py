import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from extend.errors import CompatibilityError, RecipeError
from extend.transfer.objective import judge
from extend.transfer.repair import REPAIR, repair_model
from tests.transfer.conftest import random_deltas

QUICK = replace(REPAIR, steps=20, lr=2e-3, keep=1.0)


@pytest.fixture
def merged(model):
    """The target with a delta that harms its answers."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in random_deltas(other, seed=1, scale=0.2).items():
            if "layers" in name:
                other.get_parameter(name).add_(delta)
    return other


@pytest.mark.parametrize(("rank", "lr"), [(None, 2e-3), (4, 2e-2)])
def test_repair_brings_the_answers_back(merged, lesson, rank, lr):
    before, frozen = judge(merged, lesson), merged.model.embed_tokens.weight.detach().clone()
    done = repair_model(merged, lesson, rank=rank, settings=replace(QUICK, lr=lr))
    assert done.scores["merged"] == before
    assert done.scores["repaired"].kl < 0.7 * before.kl
    assert judge(merged, lesson).to_json() == pytest.approx(
        done.scores["repaired"].to_json(), abs=1e-5)
    assert_close(merged.model.embed_tokens.weight, frozen, atol=0, rtol=0)
    assert all(p.requires_grad and p.grad is None for p in merged.parameters())
    assert not any(hasattr(module, "parametrizations") for module in merged.modules())
    assert not merged.training


def test_long_rows_are_learnt_beside(merged, lesson):
    before = judge(merged, lesson)
    done = repair_model(merged, lesson, settings=replace(QUICK, keep=0.5))
    assert done.scores["repaired"].objective(0.5) < before.objective(0.5)
    assert done.scores["repaired"].retrieval_loss < before.retrieval_loss


def test_a_lora_changes_matrices_of_the_layers_by_its_rank(merged, lesson):
    before = {n: p.detach().clone() for n, p in merged.named_parameters()}
    done = repair_model(merged, lesson, rank=2, settings=replace(QUICK, steps=10))
    assert done.step > 0
    changed = {n: p.detach() - before[n] for n, p in merged.named_parameters()
               if bool((p != before[n]).any())}
    assert sorted(changed) == done.trained
    assert len(changed) == 14
    for delta in changed.values():
        values = torch.linalg.svdvals(delta)
        assert values[2] < 1e-3 * values[0]


@pytest.mark.parametrize("rank", [None, 4])
def test_no_steps_leave_every_bit(merged, lesson, rank):
    before = {n: p.detach().clone() for n, p in merged.named_parameters()}
    done = repair_model(merged, lesson, rank=rank, settings=replace(QUICK, steps=0))
    assert done.step == 0
    assert done.scores["merged"] == done.scores["repaired"]
    assert_close(dict(merged.named_parameters()), before, atol=0, rtol=0)


def test_steps_that_only_harm_are_taken_back(model, lesson):
    """A model that is the target already cannot agree with it better."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    done = repair_model(model, lesson, settings=replace(QUICK, lr=1.0, steps=12))
    assert done.step == 0
    assert len(done.history) == 3 + 1  # at 5, 10 and 12
    assert_close(dict(model.named_parameters()), before, atol=0, rtol=0)


def test_learning_stops_when_nothing_improves(model, lesson):
    done = repair_model(model, lesson, settings=replace(
        QUICK, lr=1.0, steps=50, check_every=2, patience=3))
    assert [look["step"] for look in done.history] == [0, 2, 4, 6]


def test_bad_models_and_ranks_are_refused(merged, lesson):
    with pytest.raises(RecipeError, match="rank is 0"):
        repair_model(merged, lesson, rank=0)
    with pytest.raises(CompatibilityError, match=r"is torch\.bfloat16; load the model in float32"):
        repair_model(merged.to(torch.bfloat16), lesson)
