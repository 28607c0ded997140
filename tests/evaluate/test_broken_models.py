"""Models that know nothing get what they deserve on every task that hides facts."""

import random
import re
from dataclasses import dataclass

import pytest

from extend.evaluate.backends.backend import AnswerScore, Generation
from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.frame import Frame
from extend.evaluate.measures import MEASURES
from extend.evaluate.tasks import TASKS
from extend.evaluate.tasks.needle import NeedleTask
from tests.evaluate.conftest import make_model
from tests.real_tokenizers import load
from tests.tiny_text import make_tokenizer

HIDING = [name for name, kind in TASKS.items() if issubclass(kind, NeedleTask)]


@dataclass
class Backend:
    """A model that is a function from a prompt, without its answer, to what it writes.

    It goes on from its own words: teacher forcing and greedy choice agree on whether an answer is
    right, so one function serves both.
    """

    frame: Frame
    name: str = "local"

    def write(self, prompt, count):
        raise NotImplementedError

    def score(self, prompts):
        scores = []
        for prompt in prompts:
            right = prompt.ids[-prompt.answer_len:]
            said = self.write(prompt, prompt.answer_len)
            scores.append(AnswerScore(said, said == right, 1.0))
        return scores

    def generate(self, prompts):
        written = [self.write(prompt, prompt.max_new_tokens) for prompt in prompts]
        return [Generation(ids, self.frame.decode(ids), False) for ids in written]


class Knowing(Backend):
    """Knows the answers: what follows has something to be measured against."""

    def write(self, prompt, count):
        if prompt.answer_len:
            return prompt.ids[-prompt.answer_len:]
        return self.frame.encode(" " + ", ".join(prompt.details["references"]))[:count]


class SameNumber(Backend):
    def write(self, prompt, count):
        return (self.frame.encode(" 12345") * count)[:count]


class FromTheBeginning(Backend):
    """Writes its prompt once more."""

    def write(self, prompt, count):
        return prompt.ids[:count]


class FromTheEnd(Backend):
    """Writes the end of its prompt once more."""

    def write(self, prompt, count):
        asked = prompt.ids[:len(prompt.ids) - prompt.answer_len]
        return asked[-count:]


class Random(Backend):
    def write(self, prompt, count):
        rng = random.Random(len(prompt.ids))
        return [rng.randrange(len(self.frame.tokenizer)) for _ in range(count)]


class AnyKey(Backend):
    """Has learned what an answer looks like, and writes one that it has seen."""

    def write(self, prompt, count):
        asked = self.frame.decode(prompt.ids[:len(prompt.ids) - prompt.answer_len])
        shape = r"is:? (\d{5,7})\.|: \"([0-9a-f-]{36})\"[,}]"
        seen = [number or value for number, value in re.findall(shape, asked)]
        key = random.Random(repr(seen)).choice(seen or ["none"])
        if not prompt.answer_len:
            return self.frame.encode(f" {key}")
        right = prompt.details["answer"]
        same = key == right.strip()
        return prompt.ids[-prompt.answer_len:] if same else [0] * prompt.answer_len


def make(name, text_file):
    return TASKS[name](**({"haystack": str(text_file)} if name == "passkey-text" else {}))


def rows_of(backend, frame, task, *, length, trials):
    cells = task.cells("x", [length], [0.2, 0.8], trials)
    return MEASURES[task.measure](backend, frame, task, cells, 0)


@pytest.mark.parametrize("mode", ["base", "chat"])
@pytest.mark.parametrize("name", HIDING)
def test_models_that_know_nothing_score_nothing(name, mode, text_file):
    frame, task = Frame.of(load("smollm2"), mode), make(name, text_file)
    for kind, deserved in ((Knowing, 1.0), (SameNumber, 0.0), (FromTheBeginning, 0.0),
                           (FromTheEnd, 0.0), (Random, 0.0)):
        rows = rows_of(kind(frame), frame, task, length=1300, trials=2)
        assert [row["score"] for row in rows] == [deserved] * len(rows), kind


@pytest.mark.parametrize("name", HIDING)
def test_picking_any_key_is_right_once_in_so_many(name, text_file):
    frame, task = Frame.of(load("smollm2")), make(name, text_file)
    row = rows_of(AnyKey(frame), frame, task, length=1300, trials=40)[0]
    in_view = row["trials"][0].get("in_view", 1)
    expected = 0.0 if name == "multi-query" else 1 / in_view  # one key is never all of them
    # The number of hits is binomial: five standard deviations.
    spread = 5 * (expected * (1 - expected) / 40) ** 0.5
    assert abs(row["score"] - expected) <= spread
    assert (row["score"] == 1.0) == (in_view == 1)


@pytest.mark.parametrize("name", HIDING)
def test_a_random_model_scores_nothing(name, text_file):
    tokenizer = make_tokenizer("bytes-bos")
    frame, task = Frame.of(tokenizer), make(name, text_file)
    backend = LocalBackend(make_model(), tokenizer, chunk=4096)
    rows = rows_of(backend, frame, task, length=2600, trials=1)
    assert [row["score"] for row in rows] == [0.0] * len(rows)
    assert all(row["n"] == 1 and row["wilson_high"] < 0.8 for row in rows)


@dataclass
class Thinker(Backend):
    """Thinks of wrong numbers first, and is cut off in every other prompt."""

    def write(self, prompt, count):
        end = "" if count % 2 else "</think>" + ", ".join(prompt.details["references"])
        return self.frame.encode(f"Perhaps 12345 or 54321, I do not know.{end}")[:count]

    def generate(self, prompts):
        said = [self.write(p, p.max_new_tokens + i % 2 - p.max_new_tokens % 2)
                for i, p in enumerate(prompts)]
        return [Generation(ids, self.frame.decode(ids), True) for ids in said]


def test_thinking_has_its_own_budget_and_is_not_graded():
    tokenizer = make_tokenizer("bytes-bos")
    tokenizer.chat_template = "<user>{{ messages[0].content }}<bot><think>"
    frame, task = Frame.of(tokenizer, "chat", thinking=200), TASKS["multi-value"]()
    plain = Frame.of(tokenizer, "chat")
    cell = task.cells("x", [2600], [], 4)[0]
    prompts = task.prompts(frame, cell, 0)
    assert [prompt.length for prompt in prompts] == [2600] * 4
    assert [a.max_new_tokens - b.max_new_tokens
            for a, b in zip(prompts, task.prompts(plain, cell, 0), strict=True)] == [200] * 4
    row, = MEASURES["generated"](Thinker(frame), frame, task, [cell], 0)
    assert row["thinking_cut"] == 0.5 and row["score"] == 0.5
    assert [trial["grade"] for trial in row["trials"]] == [1.0, 0.0, 1.0, 0.0]
