"""Weights of a merge: their gradient, the ones they must find, and that they are never worse."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from extend.errors import DataError, RecipeError, TrainingError
from extend.transfer.fit import FIT, fit_weights
from extend.transfer.groups import GROUPS
from extend.transfer.learn import LearnSettings
from extend.transfer.lesson import build_lesson
from extend.transfer.objective import judge, token_losses
from extend.transfer.sums import LowRank, added
from tests.transfer.conftest import MAX_NEW, PROMPTS, random_deltas

SKILL_ONLY = replace(FIT, keep=1.0)


def test_gradient_of_a_weight_is_the_slope(model, lesson):
    deltas = random_deltas(model, seed=1, scale=0.2)
    alphas = {name: nn.Parameter(torch.tensor(0.6)) for name in deltas}
    model.requires_grad_(False)

    def loss() -> torch.Tensor:
        return token_losses(model, lesson.answers[0], lesson.head).mean() \
            + token_losses(model, lesson.long[0], lesson.head).mean()

    step = 1e-2
    with added(model, deltas, alphas):
        loss().backward()
        found = torch.stack([alpha.grad for alpha in alphas.values()])
        slopes = []
        with torch.no_grad():
            for alpha in alphas.values():
                values = []
                for place in (0.6 + step, 0.6 - step):
                    alpha.fill_(place)
                    values.append(loss().double())
                alpha.fill_(0.6)
                slopes.append((values[0] - values[1]) / (2 * step))
    # The loss is an fp32 number near 5, so a slope over 0.02 is known to about 1e-4.
    assert_close(found, torch.stack(slopes).float(), atol=1e-3, rtol=1e-2)


def test_activations_computed_again_give_the_same_weights(model, lesson):
    deltas = random_deltas(model, seed=1, scale=0.2)
    found = [fit_weights(model, deltas, lesson, starts=[0.5],
                         settings=replace(FIT, steps=3, recompute=again)).groups
             for again in (True, False)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert not model.training


def test_the_weights_that_made_the_teacher_are_found(model):
    """The target's answers are those of a merge at known weights, which nothing else explains."""
    deltas = random_deltas(model, seed=2, scale=0.3)
    group_of = GROUPS["layer"]
    true = {"layers.0": 0.3, "layers.1": 0.9, "vocabulary": 0.6, "model.norm": 0.75}
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            teacher.get_parameter(name).add_(true[group_of(name)] * delta)
    lesson = build_lesson(teacher, PROMPTS, [], max_new=24)
    found = fit_weights(model, deltas, lesson, groups="layer", starts=[0.6],
                        settings=LearnSettings(steps=80, lr=0.05, keep=1.0, patience=99))
    assert found.scores["fitted"].kl < 0.02 * found.scores["plain"].kl
    assert found.scores["fitted"].agreement == 1.0
    # A single vector of norm weights hardly shows in the answers.
    del true["model.norm"]
    assert {group: found.groups[group] for group in true} == pytest.approx(true, abs=0.08)


def test_a_delta_that_only_harms_gets_less_weight(model, lesson):
    deltas = random_deltas(model, seed=1, scale=0.3)
    found = fit_weights(model, deltas, lesson, settings=SKILL_ONLY)
    assert found.scores["rope"].kl == pytest.approx(0.0, abs=1e-6)  # the RoPE is the same here
    assert found.scores["fitted"].kl < 0.2 * found.scores["plain"].kl
    assert max(found.weights.values()) < 0.5
    assert set(found.weights) == set(deltas)
    assert found.groups == {GROUPS["kind"](name): w for name, w in found.weights.items()}


def test_scores_are_those_of_a_merge_at_these_weights(model, lesson):
    deltas = random_deltas(model, seed=1, scale=0.3)
    found = fit_weights(model, deltas, lesson, settings=replace(FIT, steps=5))
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            merged.get_parameter(name).add_(found.weights[name] * delta)
    assert judge(merged, lesson).to_json() == pytest.approx(
        found.scores["fitted"].to_json(), abs=1e-5)


def test_low_rank_deltas_get_the_weights_of_their_products(model, lesson):
    generator = torch.Generator().manual_seed(0)
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    low = {n: LowRank(0.1 * torch.randn(4, model.get_parameter(n).shape[1], generator=generator),
                      torch.randn(model.get_parameter(n).shape[0], 4, generator=generator), 0.5)
           for n in names}
    dense = {n: delta.scaling * delta.lora_B @ delta.lora_A for n, delta in low.items()}
    settings = replace(FIT, steps=4)
    found = [fit_weights(model, deltas, lesson, settings=settings) for deltas in (low, dense)]
    assert found[0].groups == pytest.approx(found[1].groups, abs=1e-4)


def test_the_long_context_is_weighed_too(model, lesson):
    """With keep 0 only the facts count; the result is judged no worse than the plain merge."""
    deltas = random_deltas(model, seed=5, scale=0.3)
    found = fit_weights(model, deltas, lesson, settings=replace(FIT, keep=0.0, steps=10))
    assert found.scores["fitted"].retrieval_loss < found.scores["plain"].retrieval_loss


def test_no_steps_give_the_better_start(model, lesson):
    deltas = random_deltas(model, seed=1, scale=0.3)
    found = fit_weights(model, deltas, lesson, settings=replace(SKILL_ONLY, steps=0))
    assert found.start == 0.5
    assert set(found.weights.values()) == {0.5}


def test_weights_stay_in_bounds(model, lesson):
    deltas = random_deltas(model, seed=1, scale=0.3)
    found = fit_weights(model, deltas, lesson, starts=[0.5], bounds=(0.45, 0.5),
                        settings=replace(SKILL_ONLY, steps=10))
    assert min(found.weights.values()) == pytest.approx(0.45)
    assert max(found.weights.values()) <= 0.5


def test_bad_settings_are_refused(model, lesson):
    deltas = random_deltas(model, seed=1, scale=0.3)
    with pytest.raises(RecipeError, match=r"groups: unknown 'layers'; did you mean 'layer'"):
        fit_weights(model, deltas, lesson, groups="layers")
    with pytest.raises(RecipeError, match=r"starts are \[2\.0\].*between 0\.0 and 1\.5"):
        fit_weights(model, deltas, lesson, starts=[2.0])
    with pytest.raises(RecipeError, match="keep is 2"):
        LearnSettings(steps=1, lr=0.1, keep=2)
    with pytest.raises(RecipeError, match="steps -1"):
        LearnSettings(steps=-1, lr=0.1)


def test_weighing_the_context_needs_long_rows(model):
    lesson = build_lesson(model, PROMPTS, [], max_new=MAX_NEW)
    with pytest.raises(DataError, match="there are no long rows"):
        fit_weights(model, random_deltas(model, seed=1, scale=0.3), lesson)


def test_a_delta_that_is_not_finite_is_told(model, lesson):
    deltas = {"model.norm.weight": torch.full((32,), float("nan"))}
    with pytest.raises(TrainingError, match="after step 0 the objective is nan"):
        fit_weights(model, deltas, lesson)
    assert not hasattr(model.model.norm, "parametrizations")


@pytest.mark.parametrize(("groups", "name", "expected"), [
    ("kind", "model.layers.3.self_attn.q_proj.bias", "layers.3.attention"),
    ("kind", "model.layers.3.self_attn.q_norm.weight", "layers.3.norms"),
    ("kind", "model.layers.3.mlp.experts.2.up_proj.weight", "layers.3.mlp"),
    ("kind", "model.layers.3.post_attention_layernorm.weight", "layers.3.norms"),
    ("kind", "model.norm.weight", "model.norm"),
    ("kind", "lm_head.weight", "vocabulary"),
    ("layer", "model.embed_tokens.weight", "vocabulary"),
    ("layer", "model.layers.12.mlp.up_proj.weight", "layers.12"),
    ("module", "model.layers.3.self_attn.q_proj.bias", "model.layers.3.self_attn.q_proj")])
def test_groups(groups, name, expected):
    assert GROUPS[groups](name) == expected
