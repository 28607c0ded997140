"""bAbI's questions in long text, answered by a reader that knows nothing of how they are made."""

import re
from collections import Counter

import pytest

from extend.errors import DataError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks import Cell
from extend.evaluate.tasks.babi import INTRO, QUESTIONS, Babi
from tests.tiny_text import KINDS, make_tokenizer

FACT = re.compile(r"^(\w+) (?:went to the (\w+)|took the (\w+)|dropped the (\w+))\.$", re.MULTILINE)


def build(question, length=3000, trials=6, seed=0, kind="bytes", **options):
    task = Babi(question=question, **options)
    return task.prompts(Frame.of(make_tokenizer(kind)), Cell("x", "babi", length, None, trials),
                        seed)


def read(text):
    """Who is where and has what, and where each thing was, from the sentences alone."""
    where, holder, seen = {}, {}, {}
    for person, place, taken, dropped in FACT.findall(text):
        if place:
            where[person] = place
        elif taken:
            assert taken not in holder, "taken from another's hands"
            holder[taken] = person
            assert seen.get(taken, [where[person]])[-1] == where[person], "taken from afar"
        else:
            assert holder.pop(dropped) == person
        for thing, owner in holder.items():
            if seen.get(thing, [None])[-1] != where[owner]:
                seen.setdefault(thing, []).append(where[owner])
    return where, holder, seen


def solve(text, question):
    where, holder, seen = read(text)
    words = re.sub(r"[?.,]", "", question).split()
    if found := re.match(r"Where was the (\w+) before the (\w+)", question):
        trail = seen[found[1]]
        assert trail.count(found[2]) == 1
        return trail[trail.index(found[2]) - 1]
    if words[:3] == ["Where", "is", "the"]:
        return where[holder[words[3]]]
    if words[:2] == ["Where", "is"]:
        return where[words[2]]
    if words[0] == "Is":
        return "yes" if where[words[1]] == words[4] else "no"
    carried = sum(owner == words[4] for owner in holder.values())
    return ["none", "one", "two"][carried]


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_follow_from_the_text(question, text_file):
    for options in ({}, {"haystack": str(text_file)}):
        prompts = build(question, 3000, 8, **options)
        for prompt in prompts:
            text = make_tokenizer("bytes").decode(prompt.ids)
            assert len(prompt.ids) == 3000 and text.startswith(INTRO)
            details = prompt.details
            assert FACT.findall(text) == FACT.findall("\n".join(details["facts"]))
            body, end = text.rsplit("\n", 1)
            assert end.startswith(details["question"]) and end.endswith(details["answer"])
            assert details["answer"] == f" {solve(body, details['question'])}"
            assert details["needle_positions"] == sorted(details["needle_positions"])
            for fact, start in zip(details["facts"], details["needle_positions"]):
                line = make_tokenizer("bytes").decode(prompt.ids[start:start + len(fact) + 1])
                assert line == f"{fact}\n"


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_equally_often_right(question):
    answers = QUESTIONS[question][1]
    prompts = build(question, 3000, 3 * len(answers))
    counts = Counter(prompt.details["answer"].strip() for prompt in prompts)
    assert counts == dict.fromkeys(answers, 3)
    assert Babi(question=question).chance == 1 / len(answers)
    assert [p.details["answer"] for p in build(question, seed=1, trials=18)] != [
        p.details["answer"] for p in build(question, trials=18)]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_exact_and_the_same_again(kind):
    for length in (2000, 2777):
        prompts = build("two-facts", length, 4, 3, kind)
        assert [len(p.ids) for p in prompts] == [length] * 4
        assert build("two-facts", length, 2, 3, kind) == prompts[:2]
        tokenizer = make_tokenizer(kind)
        for prompt in prompts:
            answer = tokenizer.decode(prompt.ids[-prompt.answer_len:]).strip()
            assert answer == prompt.details["answer"].strip()


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(RecipeError, match="did you mean 'two-facts'"):
        Babi(question="two-fact")
    with pytest.raises(DataError, match=r"x: a length of 300 leaves no room .* take \d+ tokens"):
        build("one-fact", 300)
    cells = Babi().cells("x", [1000, 2000], [0.0, 1.0], 3)
    assert [(cell.length, cell.depth, cell.trials) for cell in cells] == [
        (1000, None, 3), (2000, None, 3)]
