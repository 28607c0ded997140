"""The streaming grid against one plain eager forward of each cell's prompt."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from extend.errors import CompatibilityError
from extend.evaluate.attention import register_prefill_attention
from extend.evaluate.backends.backend import AnswerScore
from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.frame import Frame
from extend.evaluate.measures import MEASURES
from extend.evaluate.measures.row import hash_prompts
from extend.evaluate.tasks.passkey_stream import SINGLE, PasskeyStream
from extend.evaluate.tasks.task import NO_NEEDLE
from tests.ring.tiny_models import make_model
from tests.tiny_text import make_tokenizer

LENGTHS, DEPTHS = (450, 540, 680), (0.0, 0.4, 1.0)
MODELS = {"llama": {}, "mistral window": {"sliding_window": 70},
          "gemma3 window": {"sliding_window": 33}}


def both(name, **options):
    """The same weights with evaluation's attention and with transformers' own."""
    models = (make_model(name, attention, vocab_size=400, **(MODELS[name] | options)).eval()
              for attention in (register_prefill_attention(), "eager"))
    return tuple(models)


def run(model, task, chunk=4096, trials=1, lengths=LENGTHS, kind="merged-digits"):
    frame = Frame.of(make_tokenizer(kind))
    cells = task.cells("stream", lengths, DEPTHS, trials)
    backend = LocalBackend(model, frame.tokenizer, chunk=chunk)
    return frame, cells, MEASURES["stream"](backend, frame, task, cells, 0)


@torch.no_grad()
def expected(reference, prompt):
    """Choices and loss of an answer from one forward of the whole prompt."""
    ids = torch.as_tensor(prompt.ids, dtype=torch.int64)[None]
    logits = reference(ids, use_cache=False).logits[0, -prompt.answer_len - 1:-1]
    answer = ids[0, -prompt.answer_len:]
    return logits.argmax(-1).tolist(), functional.cross_entropy(logits, answer).item()


@pytest.mark.parametrize("name", MODELS)
def test_each_cell_is_one_forward_of_its_prompt(name):
    model, reference = both(name)
    task = PasskeyStream(spot_checks=2)
    frame, cells, rows = run(model, task, trials=2 if name == "llama" else 1)
    assert [c.control for c in cells] == [None] * 9 + [NO_NEEDLE, SINGLE, SINGLE]
    for cell, row in zip(cells, rows, strict=True):
        prompts = task.prompts(frame, cell, 0)
        assert {len(prompt.ids) for prompt in prompts} == {cell.length} == {row["actual_length"]}
        assert row["prompt_sha256"] == hash_prompts(prompts)
        found = [expected(reference, prompt) for prompt in prompts]
        assert [frame.tokenizer.decode(choices) for choices, _ in found] == [
            trial["predicted"] for trial in row["trials"]]
        weights = torch.tensor([prompt.answer_len for prompt in prompts], dtype=torch.float)
        losses = torch.tensor([loss for _, loss in found])
        # fp32, and stored with six digits; losses are of size 10.
        assert row["answer_loss"] == pytest.approx(
            float((losses * weights).sum() / weights.sum()), rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3 window"])
def test_rows_do_not_depend_on_the_parts(name):
    model, _ = both(name)
    rows = [run(model, PasskeyStream(spot_checks=None), chunk=chunk)[2] for chunk in (4096, 97)]
    for whole, cut in zip(*rows, strict=True):
        assert whole.pop("answer_loss") == pytest.approx(cut.pop("answer_loss"), rel=1e-4)
        assert whole == cut


class Knows:
    """A backend that answers by a rule, in place of a model."""

    name = "rule"

    def __init__(self, rule):
        self._rule = rule

    def new_cache(self, room):
        return []

    def hidden_parts(self, ids, cache):
        cache.extend(ids.tolist())
        yield 0, None

    def score_after(self, cache, prompts):
        return [self._score(cache + list(prompt.ids), prompt.answer_len) for prompt in prompts]

    def score(self, prompts):
        return [self._score(list(prompt.ids), prompt.answer_len) for prompt in prompts]

    def _score(self, ids, answer_len):
        wanted = ids[-answer_len:]
        predicted = self._rule(ids[:-answer_len], wanted)
        return AnswerScore(predicted, predicted == wanted, 0.0)


def copies(before, wanted):
    """Finds the fact by the words of the question, as a model that retrieves would."""
    text = make_tokenizer("bytes").decode(before)
    name = text.rpartition("The pass key for ")[2].removesuffix(" is ").removesuffix(" is")
    fact = text.partition(f"The pass key for {name} is ")[2]
    return make_tokenizer("bytes").encode(fact[:5])


def says(number):
    return lambda before, wanted: make_tokenizer("bytes").encode(number)


def grid(rule, **options):
    task = PasskeyStream(**options)
    frame = Frame.of(make_tokenizer("bytes"))
    cells = task.cells("stream", LENGTHS, DEPTHS, 2)
    return cells, MEASURES["stream"](Knows(rule), frame, task, cells, 0)


def test_a_model_that_retrieves_scores_all_and_nothing_without_facts():
    cells, rows = grid(copies)
    for cell, row in zip(cells, rows, strict=True):
        assert row["score"] == (0.0 if cell.control == NO_NEEDLE else 1.0)
        if cell.control == SINGLE:
            assert (row["agreeing"], row["n"], row["facts_in_view"]) == (2, 2, 1)
            assert row["stream_score"] == 1.0


@pytest.mark.parametrize("rule", [says("12345"), lambda before, wanted: before[-len(wanted):],
                                  lambda before, wanted: before[400:400 + len(wanted)]])
def test_a_broken_model_scores_nothing(rule):
    assert {row["score"] for row in grid(rule)[1]} == {0.0}


def test_the_last_key_alone_scores_the_deepest_cells_alone():
    def last(before, wanted):
        text = make_tokenizer("bytes").decode(before)
        told = [part[:5] for part in text.split(" is ")[1:] if part[:5].isdigit()]
        return make_tokenizer("bytes").encode(told[-1]) if told else []

    cells, rows = grid(last, spot_checks=None)
    assert {cell.depth: row["score"] for cell, row in zip(cells, rows, strict=True)} == {
        0.0: 0.0, 0.4: 0.0, 1.0: 1.0, None: 0.0}


def test_disagreement_of_a_spot_check_is_counted():
    """A model that is lost as soon as a second fact is in view."""
    def lost(before, wanted):
        many = make_tokenizer("bytes").decode(before).count(".\n") > 0
        facts = make_tokenizer("bytes").decode(before).split("The pass key for ")[1:-1]
        return [] if many and len(facts) > 1 else wanted

    cells, rows = grid(lost, controls=False)
    for cell, row in zip(cells, rows, strict=True):
        if cell.control == SINGLE:
            assert (row["score"], row["stream_score"], row["agreeing"]) == (1.0, 0.0, 0)


def test_what_cannot_be_asked_after_a_cache_is_refused_by_name():
    task = PasskeyStream()
    frame = Frame.of(make_tokenizer("bytes"))
    cells = task.cells("stream", LENGTHS, DEPTHS, 1)
    with pytest.raises(CompatibilityError, match="backend 'server' keeps no cache"):
        MEASURES["stream"](SimpleNamespace(name="server"), frame, task, cells, 0)
    model, _ = both("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                                              "rope_theta": 10000.0})
    with pytest.raises(CompatibilityError, match="RoPE of type 'dynamic' changes with the length"):
        run(model, PasskeyStream())


def test_a_task_goes_to_another_process_without_its_rows():
    task = PasskeyStream()
    frame = Frame.of(make_tokenizer("bytes"))
    cell = task.cells("stream", LENGTHS, DEPTHS, 1)[0]
    before = task.prompts(frame, cell, 0)
    other = pickle.loads(pickle.dumps(task))
    assert len(pickle.dumps(task)) < 2000
    assert hash_prompts(other.prompts(frame, cell, 0)) == hash_prompts(before)
