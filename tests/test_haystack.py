import random

import pytest

from extend.errors import DataError
from extend.haystack import (
    FILLER,
    Haystack,
    Passage,
    encode,
    encode_lines,
    hide,
    insert,
    prefix_ids,
    split_answer,
)
from tests.real_tokenizers import REAL, load
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


PROSE = ("It was late. Mr. Smith met J. Doe at 5 p.m. in St. Louis! \"Why?\" She laughed. 1. Go on "
         "with 3.5 of them. (Then stop.) And so: no. not here... But here.")


@pytest.mark.parametrize("name", [*REAL, "unigram", "words"])
def test_sentences_begin_after_a_full_stop_and_before_a_capital(name):
    tokenizer = load(name)
    haystack = Haystack.from_texts(tokenizer, [PROSE], "here")
    found = {"".join(tokenizer.decode(haystack.ids[i:]).split())[:6] for i in haystack.inside}
    wanted = {"Mr.Smi", "\"Why?\"", "Shelau", "(Thens", "Andso:", "Buther"}
    # Not after titles, initials and numbers of a list; some tokenizers join a full stop and more.
    assert found <= wanted and len(found) >= 2
    if name in ("smollm2", "p50k", "mistral"):
        assert found == wanted


@pytest.mark.parametrize("name", [*REAL, "unigram"])
def test_text_of_one_line_has_boundaries_at_its_sentences(name):
    tokenizer = load(name)
    haystack = Haystack.from_texts(tokenizer, [" ".join([PROSE] * 40)], "here")
    line_break = encode(tokenizer, "\n", after_line=True)
    facts = [encode(tokenizer, f"The key {i} is {i}.\n", after_line=True) for i in range(5)]
    for seed in range(4):
        passage = haystack.window(700, random.Random(seed))
        assert len(passage.ids) == 700 and tokenizer.decode(passage.ids).endswith("\n")
        depths = [0.0, 0.31, 0.3, 0.9, 1.0]
        ids, starts = hide(passage, facts, depths)
        assert len(ids) == 700 + sum(map(len, facts))
        for fact, start, depth in zip(facts, starts, depths, strict=True):
            assert ids[start:start + len(fact)] == fact
            before = ids[:start]
            assert not before or before[-len(line_break):] == line_break or (
                tokenizer.decode(before).endswith("\n"))
            # No sentence here has more than 30 tokens; the other facts stand before it, too.
            assert abs(start - depth * 700) <= 30 + sum(map(len, facts)) + 5 * len(line_break)


@pytest.mark.parametrize("name", [*REAL, "unigram", "words"])
def test_pieces_of_a_long_text_are_tokenised_as_the_whole(name):
    tokenizer = load(name)
    text = "\n\n".join(make_text(150, seed) + "  - an item,\n\tand more." for seed in range(3))
    haystack = Haystack.from_texts(tokenizer, [text], "here")
    assert len(text) > 9000
    assert haystack.ids.tolist() == encode(tokenizer, text + "\n")


@pytest.mark.parametrize("name", [*REAL, *KINDS, "unigram"])
def test_lines_read_as_after_a_line_break(name):
    tokenizer = make_tokenizer(name) if name in KINDS else load(name)
    texts = ["The end.\n", " 12 of them\n", "\n", "<book>\n"]
    for text, ids in zip(texts, encode_lines(tokenizer, texts), strict=True):
        assert ids == encode(tokenizer, text, after_line=True)
        first = encode(tokenizer, "One.\n")
        assert tokenizer.decode(first + ids) == tokenizer.decode(encode(tokenizer, "One.\n" + text))
    assert encode(tokenizer, "", after_line=True) == [] and encode_lines(tokenizer, []) == []


def test_a_fact_inside_a_line_takes_a_line_break_from_the_front():
    passage = Passage(list(range(20)), [0, 1, 8, 12, 20], frozenset({8}), [99])
    hidden, starts = insert(passage, [[-1], [-2]], [0.4, 0.41])
    assert hidden.ids == [*range(1, 8), 99, -1, -2, *range(8, 20)] and starts == [8, 9]
    assert hidden.boundaries == [0, 8, 9, 10, 14, 22] and not hidden.inside
    again, starts = insert(hidden, [[-3]], [0.45])
    assert again.ids == [*hidden.ids[:10], -3, *hidden.ids[10:]] and starts == [10]


def test_boundaries_follow_what_is_inserted():
    passage = Passage(list(range(30)), [0, 5, 10, 20, 25, 30], frozenset({5, 20}), [99])
    hidden, starts = insert(passage, [[-1, -2]], [0.35])
    assert starts == [10] and hidden.boundaries == [0, 5, 10, 12, 22, 27, 32]
    assert hidden.inside == {5, 22} and hidden.ids[22] == 20
