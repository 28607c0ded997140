"""Continuations: what transformers and the plain definition write, row by row, for any padding."""

import torch
from torch.testing import assert_close

from extend.transfer.generate import continue_prompts, sampler
from extend.transfer.lesson import sample_texts
from tests.transfer.conftest import MAX_NEW, PROMPTS


@torch.no_grad()
def by_definition(model, prompt: list[int], max_new: int) -> list[int]:
    """Argmax of a forward over everything so far, without a cache."""
    ids = list(prompt)
    for _ in range(max_new):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt):]


def test_greedy_rows_are_those_of_one_prompt_alone(model):
    found = continue_prompts(model, PROMPTS, max_new=MAX_NEW, stop=())
    assert found == [by_definition(model, prompt, MAX_NEW) for prompt in PROMPTS]
    alone = [model.generate(torch.tensor([p]), max_new_tokens=MAX_NEW, do_sample=False,
                            eos_token_id=None)[0, len(p):].tolist() for p in PROMPTS]
    assert found == alone


def test_batches_do_not_change_what_is_written(model):
    together = continue_prompts(model, PROMPTS, max_new=MAX_NEW, stop=())
    for batch_tokens in (1, 40, 60):
        assert continue_prompts(model, PROMPTS, max_new=MAX_NEW, stop=(),
                                batch_tokens=batch_tokens) == together


def test_a_stop_token_ends_its_own_row_only(model):
    free = continue_prompts(model, PROMPTS, max_new=MAX_NEW, stop=())
    stop = free[2][3]
    expected = [row[:row.index(stop) + 1] if stop in row else row for row in free]
    assert expected != free
    assert continue_prompts(model, PROMPTS, max_new=MAX_NEW, stop={stop}) == expected


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    choose = sampler(0)
    drawn = choose(logits.expand(20000, 4))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    # The standard error of the largest share is 0.0034.
    assert_close(shares, logits[0].softmax(0), atol=0.012, rtol=0)


def test_sampled_texts_depend_on_the_seed_alone(model):
    first = sample_texts(model, [0], count=3, length=10, seed=1)
    assert sample_texts(model, [0], count=3, length=10, seed=1) == first
    assert sample_texts(model, [0], count=3, length=10, seed=2) != first
    assert [len(text) for text in first] == [11, 11, 11]


def test_a_sampled_text_leaves_its_end_out(model):
    free = sample_texts(model, [0], count=1, length=10, seed=1)[0]
    stop = free[5]
    assert stop not in free[1:5]
    assert sample_texts(model, [0], count=1, length=10, seed=1, stop={stop}) == [free[:5]]
