"""Rows of exact length with their facts in place; two halves that share no text."""

import json
import random
from pathlib import Path

import pytest
import torch

from extend.errors import DataError
from extend.haystack import Haystack
from extend.search.data import HELD_OUT, SEARCH, Sizes, build_splits, cut_windows
from extend.search.needles import NAMES, build_rows, fitting_facts
from tests.tiny_text import KINDS, make_text, make_tokenizer

SIZES = Sizes(rows=4, needles=3, short_tokens=2000, sibling_tokens=1000)


def splits_of(path: Path, seed: int = 0, **texts):
    return build_splits(make_tokenizer("bytes-bos"), path, texts or {"own": None}, native_len=512,
                        target_len=1024, sizes=SIZES, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("facts", [1, 3])
def test_every_answer_stands_in_a_fact_at_its_depth(kind: str, facts: int):
    tokenizer = make_tokenizer(kind)
    haystacks = {"text": Haystack.from_texts(tokenizer, [make_text(500)], "text"),
                 "filler": Haystack.filler(tokenizer, 3000)}
    rows = build_rows(tokenizer, haystacks, 1800, num_rows=4, num_facts=facts,
                      rng=random.Random(0))
    assert [row.source for row in rows] == ["text", "filler"] * 2
    for row in rows:
        assert len(row.ids) == 1800 and len(row.answers) == facts == len(row.depths)
        for number, ((low, high), depth) in enumerate(zip(row.answers, row.depths)):
            key = tokenizer.decode(row.ids[low:high]).strip()
            assert key.isdigit() and low > 1300
            around = tokenizer.decode(row.ids[int(depth * 1800):int(depth * 1800) + 60])
            assert key[-4:] in around  # merged digits may leave the first in the question
            if facts > 1:
                assert number / facts - 0.15 < depth < (number + 1) / facts + 0.15
                asked = tokenizer.decode(row.ids[low - 45:low])
                names = [name for name in NAMES if name in around.split(".")[0]]
                assert any(name in asked for name in names)


def test_facts_are_asked_for_in_another_order():
    tokenizer = make_tokenizer("bytes")
    haystacks = {"filler": Haystack.filler(tokenizer, 3000)}
    rows = build_rows(tokenizer, haystacks, 2500, num_rows=6, num_facts=5, rng=random.Random(0))
    assert sum(row.answers != sorted(row.answers) for row in rows) >= 4
    assert all(row.depths == sorted(row.depths) for row in rows)


def test_rows_are_the_same_again_and_differ_by_seed_length_and_half(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text(make_text(600))
    first, again, other = splits_of(path), splits_of(path), splits_of(path, seed=1)
    assert first[SEARCH].rows(1024) == again[SEARCH].rows(1024)
    assert first[SEARCH].rows(1024) != other[SEARCH].rows(1024)
    assert first[SEARCH].rows(1024) != first[HELD_OUT].rows(1024)
    assert [len(row.ids) for row in first[SEARCH].rows(777)] == [777] * 4


def test_the_halves_share_no_text(tmp_path: Path):
    lines = [f"line {i} of the text that is cut in the middle\n" for i in range(1200)]
    path = tmp_path / "text.txt"
    path.write_text("".join(lines))
    splits = splits_of(path)
    tokenizer = make_tokenizer("bytes-bos")
    halves = [set(tokenizer.decode(splits[half].haystacks["text"].ids).splitlines())
              for half in (SEARCH, HELD_OUT)]
    assert not halves[0] & halves[1] and min(map(len, halves)) > 500


def test_short_documents_are_dealt_out_whole(tmp_path: Path):
    path = tmp_path / "skill.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i:03d} ", "answer": "yes " * 9}) + "\n"
                            for i in range(160)))
    tokenizer = make_tokenizer("bytes-bos")
    text = tmp_path / "text.txt"
    text.write_text(make_text(600))
    splits = splits_of(text, own=path)
    for half, parity in ((SEARCH, 0), (HELD_OUT, 1)):
        windows = splits[half].siblings["own"]
        assert windows.shape[1] == 512 and len(windows) == 4
        told = tokenizer.decode(windows.flatten().tolist())
        numbers = {int(word[1:]) for word in told.split() if word.startswith("p") and
                   len(word) == 4}
        assert len(numbers) > 10 and {n % 2 for n in numbers} == {parity}


def test_windows_begin_like_a_text_and_do_not_overlap():
    tokenizer = make_tokenizer("bytes-bos")
    haystack = Haystack(list(range(1000, 1950)), [], "numbers")
    windows = cut_windows(haystack, 101, 10_000, [tokenizer.bos_token_id])
    assert windows.shape == (9, 101) and (windows[:, 0] == tokenizer.bos_token_id).all()
    flat = windows[:, 1:].flatten()
    assert len(torch.unique(flat)) == len(flat)
    with pytest.raises(DataError, match=r"numbers: has 950 tokens, too few for a window of 2000"):
        cut_windows(haystack, 2000, 1, [])


def test_facts_leave_two_thirds_to_the_text():
    tokenizer = make_tokenizer("bytes")
    assert fitting_facts(tokenizer, 100_000, 16) == 16
    count = fitting_facts(tokenizer, 3000, 16)
    haystacks = {"filler": Haystack.filler(tokenizer, 3000)}
    row = build_rows(tokenizer, haystacks, 3000, num_rows=1, num_facts=count,
                     rng=random.Random(0))[0]
    assert 2 < count < 16 and min(low for low, _ in row.answers) > 1900
    assert fitting_facts(tokenizer, 100, 16) == 2 and fitting_facts(tokenizer, 100, 1) == 1


def test_rows_too_short_for_the_facts_say_what_they_take():
    tokenizer = make_tokenizer("bytes")
    with pytest.raises(DataError, match=r"rows of 120 tokens have no room for 2 facts"):
        build_rows(tokenizer, {"filler": Haystack.filler(tokenizer, 200)}, 120, num_rows=1,
                   num_facts=2, rng=random.Random(0))


def test_a_json_line_without_text_is_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"question": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: has neither text nor prompt and answer; "
                                        r"it has question"):
        splits_of(path)


@pytest.mark.parametrize(("text", "told"), [
    ("word " * 1400, r"7,000 characters in 1 different documents"),
    ("\n \n", r"0 characters in 0 different documents"),
    ("", r"0 characters in 0 different documents")])
def test_a_text_too_short_to_cut_says_how_long_it_is(tmp_path: Path, text: str, told: str):
    path = tmp_path / "text.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"text\.txt: the text is too short: {told}.* from 8,000 "
                                        r"characters on, .* at least 1,024 tokens; give more"):
        splits_of(path)


def test_a_document_that_comes_twice_is_in_one_half_only(tmp_path: Path):
    """Copies at even and at odd places; without them every other document is held out."""
    documents = [f"document {i:02d} " * 60 for i in range(20)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for document in documents
                            for text in (document, document)))
    splits, tokenizer = splits_of(path), make_tokenizer("bytes-bos")
    found = [{w for w in tokenizer.decode(splits[half].haystacks["text"].ids).split()
              if w.isdigit()} for half in (SEARCH, HELD_OUT)]
    assert found == [{f"{i:02d}" for i in range(start, 20, 2)} for start in (0, 1)]
