"""Losses and scores against torch on whole logits, row by row."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from extend.errors import CompatibilityError, DataError
from extend.transfer import objective
from extend.transfer.batches import make_batches, taught
from extend.transfer.generate import continue_prompts
from extend.transfer.lesson import build_lesson
from extend.transfer.objective import Head, judge, token_losses
from extend.transfer.rows import Row, answered
from tests.transfer.conftest import MAX_NEW, PROMPTS, random_deltas


@pytest.fixture
def moved(model):
    """Another model, near enough for its answers to be partly the same."""
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in random_deltas(other, seed=3, scale=0.1).items():
            other.get_parameter(name).add_(delta)
    return other


@torch.no_grad()
def logits_of(model, row: Row) -> torch.Tensor:
    """[scored tokens, vocabulary], of one row alone."""
    logits = model(torch.tensor([row.ids])).logits[0]
    return logits[[i - 1 for i, scored in enumerate(row.scored) if scored]]


def rows_of(model) -> list[Row]:
    return [answered(p, a) for p, a in zip(
        PROMPTS, continue_prompts(model, PROMPTS, max_new=MAX_NEW, stop=()), strict=True)]


def test_kl_is_that_of_whole_logits(model, moved, monkeypatch):
    monkeypatch.setattr(objective, "_HEAD_ROWS", 7)  # parts that end inside of rows
    rows = rows_of(model)
    batch, = taught(model, make_batches(rows, model.device))
    in_order = sorted(rows, key=lambda row: len(row.ids))
    wanted = torch.cat([logits_of(model, row) for row in in_order]).log_softmax(-1)
    given = torch.cat([logits_of(moved, row) for row in in_order]).log_softmax(-1)
    expected = (wanted.exp() * (wanted - given)).sum(-1)
    assert expected.min() > 1e-3
    # Two orders of summing fp32 numbers of about 10.
    assert_close(token_losses(moved, batch, Head.of(model).frozen()), expected,
                 atol=1e-5, rtol=1e-4)


def test_a_model_diverges_from_itself_by_nothing(model, lesson):
    scores = judge(model, lesson)
    assert scores.kl == pytest.approx(0.0, abs=1e-7)
    assert scores.agreement == 1.0


def test_facts_cost_their_cross_entropy(model, long_rows, lesson):
    batch, = make_batches(long_rows[:1], model.device)
    labels = torch.tensor([i for i, s in zip(*long_rows[0], strict=True) if s])
    expected = functional.cross_entropy(logits_of(model, long_rows[0]), labels, reduction="none")
    assert_close(token_losses(model, batch, lesson.head), expected, atol=1e-5, rtol=1e-5)


def test_gradient_is_that_of_whole_logits(model, moved, monkeypatch):
    monkeypatch.setattr(objective, "_HEAD_ROWS", 5)
    rows = rows_of(model)[:2]
    batches = taught(model, make_batches(rows, model.device))
    sum(token_losses(moved, batch, Head.of(model).frozen()).sum() for batch in batches).backward()
    found = {name: p.grad.clone() for name, p in moved.named_parameters()}
    moved.zero_grad()
    total = 0.0
    for row in rows:
        places = [i - 1 for i, scored in enumerate(row.scored) if scored]
        given = moved(torch.tensor([row.ids])).logits[0, places].log_softmax(-1)
        wanted = logits_of(model, row).log_softmax(-1)
        total = total + (wanted.exp() * (wanted - given)).sum()
    total.backward()
    for name, p in moved.named_parameters():
        assert_close(found[name], p.grad, atol=1e-4, rtol=1e-3)


def test_agreement_is_that_of_greedy_answers(model, moved, lesson):
    theirs = continue_prompts(model, PROMPTS[1::2], max_new=MAX_NEW, stop=())
    ours = continue_prompts(moved, PROMPTS[1::2], max_new=MAX_NEW, stop=())
    same = [a == b for a, b in zip(theirs, ours, strict=True)]
    assert judge(moved, lesson).agreement == pytest.approx(sum(same) / len(same))


def test_halves_share_no_row(model, long_rows):
    lesson = build_lesson(model, PROMPTS, long_rows, max_new=MAX_NEW)
    for first, second, rows in ((lesson.answers, lesson.judged_answers, len(PROMPTS)),
                                (lesson.long, lesson.judged_long, len(long_rows))):
        learnt = {tuple(row.tolist()) for batch in first for row in batch.ids}
        judged = {tuple(row.tolist()) for batch in second for row in batch.ids}
        assert not learnt & judged
        assert len(learnt) == len(judged) == rows // 2


def test_a_lesson_outlives_changes_of_the_target(model, lesson):
    before = lesson.head.weight.clone()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert_close(lesson.head.weight, before, atol=0, rtol=0)


def test_a_lesson_needs_two_halves(model, long_rows):
    with pytest.raises(DataError, match="1 prompts: at least two"):
        build_lesson(model, PROMPTS[:1], long_rows, max_new=MAX_NEW)
    with pytest.raises(DataError, match="1 long row: at least two"):
        build_lesson(model, PROMPTS, long_rows[:1], max_new=MAX_NEW)


def test_prompts_stay_within_the_native_length(model):
    with pytest.raises(DataError, match=r"prompt 2 has 60 tokens and its answer up to 8, together "
                                        r"more than the target's native length of 64"):
        build_lesson(model, [[1, 2], [3] * 60], [], max_new=8)


def test_models_that_change_their_logits_are_refused(model):
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(CompatibilityError, match=r"final_logit_softcapping is 30\.0"):
        Head.of(model)
