"""Rows from models whose answers are known beforehand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.cells import describe, score_unit
from extend.evaluate.frame import Frame
from extend.evaluate.plan import Unit
from extend.evaluate.tasks import TASKS, Cell
from tests.tiny_text import KINDS, make_tokenizer

VOCAB = 400


class Rigged(nn.Module):
    """Stands in for a causal model: `choose(ids)` is the next token after `ids`."""

    config = SimpleNamespace(model_type="rigged")
    device = torch.device("cpu")

    def __init__(self, choose, last):
        super().__init__()
        self.choose, self.last = choose, last

    def base_model(self, input_ids, use_cache):
        hidden = torch.zeros(*input_ids.shape, VOCAB)
        for row, ids in enumerate(input_ids.tolist()):
            for i in range(max(0, len(ids) - self.last), len(ids)):
                hidden[row, i] = 20.0 * one_hot(torch.tensor(self.choose(ids[:i + 1])), VOCAB)
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self):
        return nn.Identity()


def score_cell(model, tokenizer, task, cell, *, seed, native_len):
    row, = score_unit(LocalBackend(model, tokenizer, chunk=2000), Frame.of(tokenizer),
                      Unit(task, (cell,)), seed=seed, native_len=native_len)
    return row


def retrieve(context):
    """Continue as the text did after the last tokens' earlier occurrence: it finds a fact."""
    for width in (8, 7, 6, 5, 4, 3, 2, 1):
        tail = context[-width:]
        for start in range(len(context) - width - 1, -1, -1):
            if context[start:start + width] == tail:
                return context[start + width]
    return 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_a_model_that_finds_the_fact_scores_1_and_without_it_0(kind, depth):
    tokenizer = make_tokenizer(kind)
    task = TASKS["passkey"]()
    row = score_cell(Rigged(retrieve, 12), tokenizer, task, Cell("x", "passkey", 600, depth, 4),
                     seed=0, native_len=500)
    assert (row["score"], row["correct"], row["n"], row["wilson_high"]) == (1.0, 4, 4, 1.0)
    assert row["actual_length"] == 600 and row["beyond_native"] is True
    assert [t["predicted"].lstrip() for t in row["trials"]] == [
        t["answer"].lstrip() for t in row["trials"]]
    control = score_cell(Rigged(retrieve, 12), tokenizer, task,
                         Cell("x", "passkey", 600, None, 4, "no-needle"), seed=0,
                         native_len=600)
    assert (control["score"], control["correct"], control["beyond_native"]) == (0.0, 0, False)
    assert control["actual_depth"] is None


def test_a_constant_model_scores_0_with_the_loss_of_a_sure_mistake():
    row = score_cell(Rigged(lambda ids: 0, 12), make_tokenizer("bytes"), TASKS["passkey"](),
                     Cell("x", "passkey", 400, 0.5, 2), seed=0, native_len=512)
    assert row["score"] == 0.0
    assert row["answer_loss"] == pytest.approx(20.0, abs=1e-3)
    assert describe(row) == "x 400 depth 0.50: 0/2"


def test_prompt_hash_tells_prompts_apart():
    def row_of(seed, **changes):
        cell = Cell(**{"name": "x", "task": "passkey", "length": 400, "depth": 0.5, "trials": 1,
                       **changes})
        return score_cell(Rigged(lambda ids: 0, 12), make_tokenizer("bytes"), TASKS["passkey"](),
                          cell, seed=seed, native_len=512)["prompt_sha256"]

    assert row_of(0) == row_of(0)
    assert len({row_of(0), row_of(1), row_of(0, trials=2), row_of(0, depth=0.25)}) == 4
