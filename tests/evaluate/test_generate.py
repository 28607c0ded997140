"""Greedy generation against transformers' own, for rows of many lengths side by side."""

import pytest
import torch

from extend.errors import CompatibilityError
from extend.evaluate.attention import register_prefill_attention
from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.generate import finish
from extend.evaluate.tasks.task import Prompt
from tests.ring.tiny_models import VOCABULARY, WINDOWED, make_ids, make_model

NAMES = ["llama", "mistral", *WINDOWED]
LENGTHS, BUDGETS = (40, 7, 64, 23), (9, 12, 5, 12)


class Numbers:
    """A tokenizer of which only decoding is asked."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


def prompts():
    ids = make_ids()[0].tolist()
    return [Prompt(ids[64 - n:64], 0, {}, budget)
            for n, budget in zip(LENGTHS, BUDGETS, strict=True)]


def greedy(model, prompt):
    """What a full forward of everything so far chooses, token by token; no cache."""
    ids = list(prompt.ids)
    with torch.no_grad():
        for _ in range(prompt.max_new_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt.ids):]


def both(name):
    model, reference = (make_model(name, attention).eval()
                        for attention in (register_prefill_attention(), "eager"))
    for some in (model, reference):
        some.generation_config.eos_token_id = None
        some.config.final_logit_softcapping = None  # refused, and tested in test_forward
    return model, reference


@pytest.mark.parametrize("chunk", [4096, 100, 16])
@pytest.mark.parametrize("name", NAMES)
def test_rows_side_by_side_write_what_each_writes_alone(name, chunk):
    model, reference = both(name)
    found = LocalBackend(model, Numbers(), chunk=chunk).generate(prompts())
    assert [g.ids for g in found] == [greedy(reference, prompt) for prompt in prompts()]
    assert all(not g.finished and g.text == " ".join(map(str, g.ids)) for g in found)


def test_an_end_token_ends_its_row_alone():
    model, reference = both("llama")
    expected = [greedy(reference, prompt) for prompt in prompts()]
    end = expected[0][3]
    model.generation_config.eos_token_id = [end, VOCABULARY - 1]
    found = LocalBackend(model, Numbers(), chunk=4096).generate(prompts())
    for generation, whole in zip(found, expected, strict=True):
        cut = next((i for i, t in enumerate(whole) if t in (end, VOCABULARY - 1)), None)
        assert generation.ids == whole[:cut]
        assert generation.finished == (cut is not None)
    assert found[0].finished and len(found[0].ids) <= 3


def test_what_comes_after_the_budget_is_not_written():
    assert finish(Numbers(), Prompt([1], 0, {}, 2), [5, 6, 7], frozenset({7})).finished is False
    assert finish(Numbers(), Prompt([1], 0, {}, 3), [5, 6, 7], frozenset({7})).ids == [5, 6]


def test_a_rope_that_grows_with_the_length_is_refused():
    model, _ = both("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(CompatibilityError, match="dynamic"):
        LocalBackend(model, Numbers(), chunk=4096).generate(prompts())


@pytest.mark.parametrize("chunk", [4096, 100, 16])
def test_token_losses_are_those_of_one_forward(chunk):
    model, reference = both("mistral")
    rows = [prompt.ids for prompt in prompts()]
    found = LocalBackend(model, Numbers(), chunk=chunk).token_losses(rows)
    for row, losses in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = reference(ids, use_cache=False).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        # fp32, the same products summed in another order.
        torch.testing.assert_close(torch.from_numpy(losses), expected, rtol=1e-4, atol=2e-5)
