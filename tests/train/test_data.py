"""Rows: exact length, a pure function of (seed, phase, index), right labels and answers."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from extend.errors import DataError
from extend.haystack import FILLER, INTRO
from extend.retrieval import rows as retrieval_rows
from extend.retrieval.forms import FORMS, Form
from extend.retrieval.names import NAMES
from extend.train import text
from extend.train.data import IGNORE, Rows, load_rows
from extend.train_options import TrainOptions
from tests.train.tiny import save_examples, save_text, save_tokenizer

LENGTH = 1024


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("data")
    return {"text": str(save_text(directory)), "examples": str(save_examples(directory))}


def load(tokenizer, data: list[dict], *, length: int = LENGTH, steps: int = 40,
         **changes) -> Rows:
    options = TrainOptions(model="m", data=data, schedule=[
        {"length": length, "steps": steps, "lr": 1e-4},
        {"length": length * 2, "steps": 4, "batch_rows": 2, "lr": 1e-4}], **changes)
    return load_rows(options, tokenizer)


def kinds(files: dict[str, str]) -> dict[str, dict]:
    return {
        "text": {"kind": "text", "path": files["text"]},
        "examples": {"kind": "examples", "path": files["examples"]},
        "named": {"kind": "retrieval", "path": files["text"], "facts": [1, 6]},
        "filler": {"kind": "retrieval", "facts": [2]},
        "classic": {"kind": "retrieval", "template": "classic"},
    }


@pytest.mark.parametrize("kind", ["text", "examples", "named", "filler", "classic"])
def test_every_row_has_exactly_its_length(kind: str, tokenizer, files):
    rows = load(tokenizer, [kinds(files)[kind]], length=700)
    for phase, length in ((0, 700), (1, 1400)):
        for index in range(8):
            row = rows.row(phase, index)
            assert row.input_ids.shape == row.labels.shape == row.answers.shape == (length,)
            assert row.cu_seqlens.dtype == np.int32
            assert row.cu_seqlens[0] == 0 and row.cu_seqlens[-1] == length
            assert (np.diff(row.cu_seqlens) > 0).all()
            predicted = row.labels != IGNORE
            np.testing.assert_array_equal(row.labels[predicted], row.input_ids[predicted])
            assert not (row.answers & ~predicted).any()


@pytest.mark.parametrize("kind", ["text", "examples", "named", "classic"])
def test_a_row_depends_on_seed_phase_and_index_only(kind: str, tokenizer, files):
    first = load(tokenizer, [kinds(files)[kind]])
    again = load(tokenizer, [kinds(files)[kind]])
    other = load(tokenizer, [kinds(files)[kind]], seed=1)
    ahead = [first.row(0, index).input_ids for index in range(6)]
    for index in (5, 2, 0):  # in any order
        np.testing.assert_array_equal(again.row(0, index).input_ids, ahead[index])
    assert other.row(0, 3).input_ids.tobytes() != ahead[3].tobytes()
    assert len({ids.tobytes() for ids in ahead}) == 6


def test_text_rows_are_one_pass_over_all_documents(tokenizer, files):
    """Rows laid end to end are the documents in some order, none lost, none twice."""
    rows = load(tokenizer, [kinds(files)["text"]])
    documents = [json.loads(line)["text"].rstrip() + "\n"
                 for line in Path(files["text"]).read_text().splitlines()]
    total = sum(len(d.encode()) + 1 for d in documents)
    stream = np.concatenate([rows.row(0, i).input_ids for i in range(-(-total // LENGTH))])
    seen = tokenizer.decode(stream[:total]).split(tokenizer.eos_token)
    assert seen.pop() == ""
    assert Counter(seen) == Counter(documents)
    second = tokenizer.decode(stream[total:])
    assert second and not "".join(seen).startswith(second)  # the next pass has another order


def test_first_token_of_each_document_is_not_predicted(tokenizer, files):
    row = load(tokenizer, [kinds(files)["text"]]).row(0, 3)
    after_eos = np.flatnonzero(row.input_ids[:-1] == tokenizer.eos_token_id) + 1
    np.testing.assert_array_equal(row.cu_seqlens[1:-1], after_eos)
    ignored = np.flatnonzero(row.labels == IGNORE)
    assert set(after_eos) <= set(ignored) <= {0, *after_eos}


def test_examples_take_the_loss_on_answers_only(tokenizer, files):
    """And none is cut: what is left of the row is padded."""
    row = load(tokenizer, [kinds(files)["examples"]], length=200).row(0, 1)
    predicted = tokenizer.decode(row.input_ids[row.labels != IGNORE])
    np.testing.assert_array_equal(row.answers, row.labels != IGNORE)
    whole = tokenizer.decode(row.input_ids)
    answers = re.findall(r"After \d+ comes( \d+\.<\|end\|>)", whole)
    assert len(answers) >= 5
    assert predicted == "".join(answers)
    padding = int(row.cu_seqlens[-2])
    assert set(row.input_ids[padding:]) == {tokenizer.eos_token_id} and 200 - padding < 20
    unmasked = {**kinds(files)["examples"], "mask_prompt": False}
    everything = load(tokenizer, [unmasked], length=200).row(0, 1)
    ignored = np.flatnonzero(everything.labels == IGNORE)
    np.testing.assert_array_equal(ignored, [*row.cu_seqlens[:-2], *range(padding, 200)])


@pytest.mark.parametrize("kind", ["named", "filler"])
def test_facts_are_hidden_and_asked_for(kind: str, tokenizer, files):
    rows = load(tokenizer, [kinds(files)[kind]])
    counts = Counter()
    for index in range(12):
        row = rows.row(0, index)
        whole = tokenizer.decode(row.input_ids)
        facts = dict(re.findall(r"(?m)^The pass key for (\w+) is (\d{5})\.\n", whole))
        questions = re.findall(
            r"What is the pass key for (\w+)\? The pass key for (\w+) is (\d{5})\.\n", whole)
        assert {name: key for name, _, key in questions} == facts
        assert all(asked == named for asked, named, _ in questions)
        assert whole.endswith(".\n") and set(facts) <= set(NAMES)
        answers = tokenizer.decode(row.input_ids[row.answers])
        assert answers == "".join(key for _, _, key in questions)
        counts[len(facts)] += 1
    assert set(counts) == ({1, 6} if kind == "named" else {2})


def test_varied_facts_are_asked_for_in_the_words_they_were_given_in(tokenizer, files):
    rows = load(tokenizer, [{**kinds(files)["named"], "template": "varied"}], length=1500, steps=60)
    seen, values = Counter(), set()
    for index in range(60):
        row = rows.row(0, index)
        whole = tokenizer.decode(row.input_ids)
        (number, form, facts), = [
            (n, form, found) for n, form in enumerate(FORMS)
            if (found := re.findall(f"(?m)^{pattern(form.fact)}$", whole))]
        order = [match.groupdict() for match in re.finditer(f"(?m)^{pattern(form.fact)}$", whole)]
        given = {fact["name"]: fact["value"] for fact in order}
        assert len(given) == len(facts) in (1, 6)
        tail = ".\n".join(f"{form.question.format(name=name)} {given[name]}" for name in asked(
            form, whole, given)) + ".\n"
        assert whole.endswith(tail)
        answers = tokenizer.decode(row.input_ids[row.answers])
        assert answers == "".join(given[name] for name in asked(form, whole, given))
        seen[number] += 1
        values |= {re.sub("[a-z]", "a", re.sub("[0-9]", "0", v)) for v in given.values()}
    assert len(seen) > 9 and len(values) > 20


def test_questions_that_do_not_fit_are_drawn_again(tokenizer, files, monkeypatch):
    """Rows that hold some wordings of so many facts and not others are built all the same."""
    data = [{**kinds(files)["named"], "template": "varied", "facts": [6]}]
    rows = load(tokenizer, data, length=560, steps=60)
    taken = [len(tokenizer.decode(rows.row(0, index).input_ids)) for index in range(60)]
    assert len(taken) == 60
    monkeypatch.setattr(retrieval_rows, "_DRAWS", 1)
    with pytest.raises(DataError, match="more than a row of 560"):
        for index in range(60):
            load(tokenizer, data, length=560, steps=60).row(0, index)


def pattern(text: str) -> str:
    """For a fact, with groups `name` and `value`."""
    return re.escape(text).replace(r"\{name\}", r"(?P<name>[a-z]+)").replace(
        r"\{value\}", r"(?P<value>[\w:-]+)")


def asked(form: Form, whole: str, given: dict[str, str]) -> list[str]:
    """Names in the order in which they are asked for, at the end of a row."""
    places = {name: whole.rindex(f"{form.question.format(name=name)} {given[name]}.\n")
              for name in given}
    return sorted(places, key=places.get)


def test_real_text_passages_come_from_the_text(tokenizer, files):
    row = load(tokenizer, [kinds(files)["named"]]).row(0, 0)
    haystack = "".join(json.loads(line)["text"].rstrip() + "\n"
                       for line in Path(files["text"]).read_text().splitlines())
    whole = tokenizer.decode(row.input_ids)
    passage = re.sub(r"The pass key for \w+ is \d{5}\.\n", "", whole.split("What is")[0])
    assert len(passage) > 300 and passage in haystack


def test_classic_row_has_the_wording_of_the_evaluation(tokenizer, files):
    row = load(tokenizer, [kinds(files)["classic"]]).row(0, 0)
    whole = tokenizer.decode(row.input_ids)
    key = re.search(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.\n", whole)[1]
    assert whole.startswith(INTRO)
    assert whole.endswith(f"\nWhat is the pass key? The pass key is {key}")
    assert FILLER in whole
    assert tokenizer.decode(row.input_ids[row.answers]) == key
    assert row.answers[-5:].all() and row.answers.sum() == 5


def test_sources_come_in_the_proportion_of_their_weights(tokenizer, files):
    data = [kinds(files)["text"] | {"weight": 3}, kinds(files)["classic"] | {"weight": 1}]
    rows = load(tokenizer, data)
    sources = Counter(rows.row(0, index).source for index in range(40))
    # Evenly spread, so 40 rows are within two of 30 to 10.
    assert abs(sources["retrieval in repeated filler"] - 10) <= 2


def test_text_for_two_sources_is_tokenised_once(tokenizer, files, monkeypatch):
    reads = []
    real = text.read_documents
    monkeypatch.setattr(text, "read_documents",
                        lambda *a, **k: reads.append(a) or real(*a, **k))
    load(tokenizer, [kinds(files)["text"], kinds(files)["named"]])
    assert len(reads) == 1


def test_names_are_many_and_distinct():
    assert len(NAMES) >= 200 and len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(("kind", "changes", "match"), [
    ("text", {"path": "/nowhere/text.jsonl"}, "/nowhere/text.jsonl: no such file"),
    ("text", {"column": "body"}, "no text under 'body'"),
    ("examples", {"path": "TEXT"}, "needs the texts 'prompt' and 'answer'"),
    ("named", {"facts": [900]}, "900 facts"),
    ("named", {"facts": [40]}, "more than a row of 1024"),
    ("classic", {"facts": [2]}, "one fact, not 2"),
])
def test_bad_data_is_named(kind: str, changes: dict, match: str, tokenizer, files):
    changes = {key: files["text"] if value == "TEXT" else value for key, value in changes.items()}
    with pytest.raises(DataError, match=re.escape(match)):
        load(tokenizer, [kinds(files)[kind] | changes])


@pytest.mark.parametrize("kind", ["text", "named"])
def test_too_little_text_is_refused(kind: str, tokenizer, files):
    with pytest.raises(DataError, match="too few"):
        load(tokenizer, [kinds(files)[kind]], length=65536)


def test_an_example_longer_than_a_row_is_refused(tokenizer, files):
    with pytest.raises(DataError, match="example .* more than a row of 16"):
        load(tokenizer, [kinds(files)["examples"]], length=16)
