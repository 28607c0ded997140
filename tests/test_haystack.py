import random

import pytest

from extend.errors import DataError
from extend.haystack import FILLER, Haystack, Passage, encode, hide, prefix_ids, split_answer
from tests.tiny_text import KINDS, make_text, make_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_is_what_the_tokenizer_puts_before_a_text(kind):
    tokenizer = make_tokenizer(kind)
    expected = [tokenizer.bos_token_id] if kind == "bytes-bos" else []
    assert prefix_ids(tokenizer) == expected
    assert prefix_ids(tokenizer) + encode(tokenizer, "door") == tokenizer("door")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "answer"), [
    ("The pass key is", " 48213"), ("The pass key is ", "48213"), ("a", "b"), ("", " 10000")])
def test_split_answer_is_the_joint_text(kind, prompt, answer):
    tokenizer = make_tokenizer(kind)
    asked, wanted = split_answer(tokenizer, prompt, answer)
    assert asked + wanted == encode(tokenizer, prompt + answer)
    # Leading tokens of white space alone belong to the prompt; every other character is asked for.
    assert tokenizer.decode(wanted).endswith(answer.lstrip())
    assert tokenizer.decode(wanted[:1]).strip()


def test_split_moves_left_of_a_token_that_spans_the_cut():
    tokenizer = make_tokenizer("merged-digits")
    asked, wanted = split_answer(tokenizer, "key is ", "48213")
    assert tokenizer.decode(asked) == "key is"
    assert tokenizer.decode(wanted) == " 48213"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 37, 400, 1111])
def test_filler_window_is_exact_and_ends_a_line(kind, num_tokens):
    tokenizer = make_tokenizer(kind)
    haystack = Haystack.filler(tokenizer, num_tokens)
    passage = haystack.window(num_tokens, random.Random(3))
    assert len(passage.ids) == num_tokens
    text = tokenizer.decode(passage.ids)
    assert text.endswith("\n") and text in FILLER * (num_tokens // 10 + 2)


@pytest.mark.parametrize("kind", KINDS)
def test_text_boundaries_are_line_starts(kind):
    tokenizer = make_tokenizer(kind)
    texts = [make_text(40, 1), "no line break at the end", make_text(30, 2) + "\n\n"]
    haystack = Haystack.from_texts(tokenizer, texts, "here")
    assert tokenizer.decode(haystack.ids) == "".join(t.rstrip() + "\n" for t in texts)
    for start in haystack.line_starts:
        assert tokenizer.decode(haystack.ids[:start]).endswith("\n")
    joined = tokenizer.decode(haystack.ids)
    assert len(haystack.line_starts) == joined.count("\n")


def test_window_boundaries_are_those_of_the_text():
    tokenizer = make_tokenizer("bytes")
    haystack = Haystack.from_texts(tokenizer, [make_text(200)], "here")
    for seed in range(5):
        passage = haystack.window(500, random.Random(seed))
        lines = [i for i in range(1, 500) if tokenizer.decode(passage.ids[:i]).endswith("\n")]
        # A line that begins with the window is boundary 0 already.
        assert passage.boundaries == [0, *lines, 500]


def test_window_larger_than_the_text_is_refused():
    tokenizer = make_tokenizer("bytes")
    haystack = Haystack.from_texts(tokenizer, ["short"], "books/x.txt")
    with pytest.raises(DataError, match=r"books/x\.txt: has 6 tokens, too few for a passage of 7"):
        haystack.window(7, random.Random(0))
    with pytest.raises(DataError, match="holds no text"):
        Haystack.from_texts(tokenizer, [], "books")


def test_hide_puts_facts_at_the_nearest_boundary():
    passage = Passage(list(range(100)), [0, 30, 60, 100])
    ids, starts = hide(passage, [[-1, -2], [-3], [-4]], [0.95, 0.4, 0.0])
    assert starts == [102, 31, 0]
    assert ids == [-4, *range(30), -3, *range(30, 100), -1, -2]
    assert [ids[s] for s in starts] == [-1, -3, -4]


def test_hide_keeps_the_order_of_facts_at_one_place():
    ids, starts = hide(Passage([7, 8], [0, 2]), [[1], [2], [3]], [0.0, 0.1, 0.2])
    assert ids == [1, 2, 3, 7, 8]
    assert starts == [0, 1, 2]
