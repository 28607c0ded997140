"""Rows on 2 and 4 gloo ranks against transformers' eager attention on one process.

Each number of ranks is started once and computes all cases; the parent compares.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from extend.errors import CompatibilityError
from extend.evaluate.backends.local import LocalBackend
from extend.evaluate.backends.ring import RingBackend
from extend.evaluate.ring_attention import ring_prefill_attention
from extend.evaluate.tasks.task import Prompt
from tests.evaluate.test_generate import Numbers, both, greedy
from tests.ring.tiny_models import make_ids
from tests.spawn import spawn

NAMES = ("llama", "mistral window", "gemma3 window", "qwen3", "qwen3 window")
# By number of ranks the chunks of each model: all rows in one forward; some; rows of many parts.
CHUNKS = {2: ((4096, 5), (30,), (5,), (30,), (5,)), 4: ((3,), (5,), (4096,), (5,), (7,))}
# fp32: sums of tens of terms of size 1 to 10 in another order; eps is 1.2e-7.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
IDS = make_ids()[0].tolist()
# Rows that no number of ranks divides, some shorter than the ranks, and answers of all lengths.
SCORED = [Prompt(IDS[64 - n:], answer) for n, answer in
          ((64, 5), (41, 40), (2, 1), (23, 1), (3, 2))]
WRITTEN = [Prompt(IDS[64 - n:], 0, {}, budget) for n, budget in ((61, 4), (1, 5), (8, 1))]
QUESTIONS = ((17, IDS[:3]), (30, IDS[5:6]), (61, IDS[9:16]))  # after so many tokens


def cases(world):
    return [(name, chunk) for name, some in zip(NAMES, CHUNKS[world], strict=True)
            for chunk in some]


def backend_of(name, chunk):
    model, _ = both(name)
    return RingBackend(model, Numbers(), chunk=chunk)


def run_all(rank, world):
    found = {}
    with torch.inference_mode():
        for name, chunk in cases(world):
            backend = backend_of(name, chunk)
            found[name, chunk] = {"score": backend.score(SCORED),
                                  "written": backend.generate(WRITTEN[:5 - world]),
                                  "after": score_at_checkpoints(backend)}
            if world == 2:
                rows, answers = ([p.ids for p in SCORED], [p.answer_len for p in SCORED])
                found[name, chunk] |= {
                    "losses": backend.token_losses(rows), "asked": ask_at_checkpoints(backend),
                    "last": backend.token_losses(rows, answers)}
        found["refused"] = refusals(rank)
        found["largest"] = largest_tensor()
    return found


def ask_at_checkpoints(backend):
    """The choices after questions that are put at checkpoints of one growing row."""
    reader, begin, found = backend.reader(), 0, []
    for end, question in QUESTIONS:
        for _ in reader.read(IDS[begin:end]):
            pass
        found.append(backend.model.lm_head(reader.ask(question)))
        again = backend.model.lm_head(reader.ask(question[:1]))  # on top of the first
        reader.truncate(end)
        found.append(again)
        begin = end
    return found


def score_at_checkpoints(backend):
    """The same by way of what a grid in one row asks a backend for."""
    cache, begin, found = backend.new_cache(64), 0, []
    for end, question in QUESTIONS:
        for _ in backend.hidden_parts(IDS[begin:end], cache):
            pass
        found += backend.score_after(cache, [Prompt(question + IDS[:2], 2), Prompt(IDS[2:6], 3)])
        begin = end
    return found


def refusals(rank):
    """Messages of what must be refused, on every rank."""
    backend, found = backend_of("llama", 64), {}
    dynamic = backend_of("llama", 64)
    dynamic.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    scaled = backend_of("llama", 64)
    scaled.model.config.logits_scaling = 8.0
    attempts = {
        "rows": lambda: backend.score([Prompt([1, 2, 3 + rank], 1)]),
        "calls": lambda: backend.score([Prompt([1, 2, 3], 1)] * (1 + rank)),
        "rope": lambda: dynamic.score(SCORED),
        "head": lambda: scaled.generate(WRITTEN),
    }  # fmt: skip
    for what, attempt in attempts.items():
        with pytest.raises(CompatibilityError) as error:
            attempt()
        found[what] = str(error.value)
    return found


class Largest(TorchDispatchMode):
    """Remembers the most elements that one operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest_tensor():
    """Of a row of 512 tokens, 32 of a rank at a time."""
    backend = backend_of("llama", 32)
    with Largest() as seen:
        backend.score([Prompt(IDS * 8, 3)])
    return seen.elements


@functools.cache
def results(world):
    return spawn(world, run_all)


@pytest.fixture(scope="module", params=CHUNKS)
def ranks(request):
    return results(request.param)


@pytest.fixture(scope="module")
def two_ranks():
    return results(2)


@pytest.fixture(scope="module")
def references():
    return {name: both(name)[1] for name in NAMES}


def logits_of(reference, ids):
    with torch.no_grad():
        return reference(torch.tensor([ids]), use_cache=False).logits[0]


def test_answers_score_as_in_one_eager_forward(ranks, references):
    for name, chunk in cases(len(ranks)):
        for prompt, score in zip(SCORED, ranks[0][name, chunk]["score"], strict=True):
            logits = logits_of(references[name], prompt.ids)[-prompt.answer_len - 1:-1]
            wanted = torch.tensor(prompt.ids[-prompt.answer_len:])
            loss = functional.cross_entropy(logits, wanted, reduction="none")
            assert score.predicted == logits.argmax(-1).tolist()
            assert score.correct == (score.predicted == wanted.tolist())
            torch.testing.assert_close(score.nll, float(loss.double().sum()), **TOLERANCE)


def test_every_token_has_its_loss(two_ranks, references):
    for name, chunk in cases(2):
        for prompt, found in zip(SCORED, two_ranks[0][name, chunk]["losses"], strict=True):
            logits, ids = logits_of(references[name], prompt.ids), torch.tensor(prompt.ids)
            expected = functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
            torch.testing.assert_close(torch.from_numpy(found), expected, **TOLERANCE)
        for prompt, found, some in zip(SCORED, two_ranks[0][name, chunk]["losses"],
                                       two_ranks[0][name, chunk]["last"], strict=True):
            torch.testing.assert_close(some, found[-prompt.answer_len:], **TOLERANCE)


def test_greedy_text_is_that_of_full_forwards(ranks, references):
    for name, chunk in cases(len(ranks)):
        expected = [greedy(references[name], prompt) for prompt in WRITTEN[:5 - len(ranks)]]
        assert [g.ids for g in ranks[0][name, chunk]["written"]] == expected


def test_questions_leave_a_growing_row_as_it_was(two_ranks, references):
    for name, chunk in cases(2):
        expected = []
        for end, question in QUESTIONS:
            logits = logits_of(references[name], IDS[:end] + question + question[:1])
            expected += [logits[end:-1], logits[-1:]]
        for found, wanted in zip(two_ranks[0][name, chunk]["asked"], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)  # logits of 1 to 10


def test_answers_after_a_row_score_as_behind_it(ranks, references):
    rows = [Prompt(IDS[:end] + row.ids, row.answer_len) for end, question in QUESTIONS
            for row in (Prompt(question + IDS[:2], 2), Prompt(IDS[2:6], 3))]
    for name, chunk in cases(len(ranks)):
        for row, score in zip(rows, ranks[0][name, chunk]["after"], strict=True):
            logits = logits_of(references[name], row.ids)[-row.answer_len - 1:-1]
            wanted = torch.tensor(row.ids[-row.answer_len:])
            assert score.predicted == logits.argmax(-1).tolist()
            loss = functional.cross_entropy(logits, wanted, reduction="sum")
            torch.testing.assert_close(score.nll, float(loss), **TOLERANCE)


def test_ranks_have_the_same_results_to_the_last_bit(ranks):
    first, *others = ranks
    for other in others:
        for case in cases(len(ranks)):
            found = first[case]
            assert other[case]["score"] == found["score"]
            assert other[case]["written"] == found["written"]
            assert other[case]["after"] == found["after"]
            for kind in {"losses", "asked"} & set(found):
                for ours, theirs in zip(found[kind], other[case][kind], strict=True):
                    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs),
                                               rtol=0, atol=0)


def test_one_process_gives_the_same_rows(ranks):
    for name in NAMES:
        local = LocalBackend(both(name)[0], Numbers(), chunk=4096)
        scores, written = local.score(SCORED), local.generate(WRITTEN[:5 - len(ranks)])
        for found in (ranks[0][case] for case in cases(len(ranks)) if case[0] == name):
            assert found["written"] == written
            for ours, theirs in zip(found["score"], scores, strict=True):
                assert (ours.predicted, ours.correct) == (theirs.predicted, theirs.correct)
                torch.testing.assert_close(ours.nll, theirs.nll, **TOLERANCE)


def test_what_would_be_wrong_is_refused_on_every_rank(ranks):
    for found in ranks:
        refused = found["refused"]
        assert "evaluation: the ranks disagree about sha256_of_ids" in refused["rows"]
        assert "rows: 1 (rank 0), 2 (rank 1)" in refused["calls"] or len(ranks) > 2
        assert f"'dynamic' changes with the length, so a row cannot be spread over {len(ranks)} " \
            "processes" in refused["rope"]
        assert "logits_scaling changes the logits" in refused["head"]


def test_no_tensor_is_as_long_as_the_row_but_a_ranks_share_of_the_keys(ranks):
    keys = 2 * 2 * 8 * 512 // len(ranks)  # of a layer; the MLP of the whole row would be 48 * 512
    for found in ranks:
        assert found["largest"] <= max(keys, 50 * 32) < 48 * 512


def test_a_model_that_tells_its_attention_nothing_is_refused():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(CompatibilityError, match="not told the keyword 'reading'"):
        ring_prefill_attention(nn.Identity(), q, q, q, None)


def test_one_process_alone_needs_no_group():
    backend = backend_of("gemma3 window", 20)
    expected = LocalBackend(both("gemma3 window")[0], Numbers(), chunk=20)
    assert backend.generate(WRITTEN) == expected.generate(WRITTEN)
    assert backend.comm.world == 1
