"""The row of a streamed grid: where its facts lie, and that each is asked at exact lengths."""

import re

import pytest

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.passkey_stream import NEAR, SINGLE, PasskeyStream, plan_slots
from extend.evaluate.tasks.task import NO_NEEDLE
from extend.haystack import FILLER
from tests.tiny_text import KINDS, make_text, make_tokenizer

LENGTHS, DEPTHS = [900, 1500, 2400], [0.0, 0.25, 0.5, 1.0]
FACT = re.compile(r"The pass key for ([a-z ]+) is (\d{5})\.\n")
CHAT = ("{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}")


def make_frame(kind, chat=False):
    tokenizer = make_tokenizer(kind)
    if chat:
        tokenizer.chat_template = CHAT
    return Frame.of(tokenizer, "chat" if chat else "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text(make_text(400), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("in_text", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_cell_has_its_length_its_depth_and_one_fact_that_answers(kind, in_text, chat, text):
    frame = make_frame(kind, chat)
    task = PasskeyStream(haystack=text if in_text else None)
    cells = task.cells("s", LENGTHS, DEPTHS, 2)
    line = max(len(frame.encode(some + "\n")) for some in (
        make_text(400).split("\n") if in_text else [FILLER.strip()]))
    for cell in cells:
        for prompt in task.prompts(frame, cell, 3):
            assert len(prompt.ids) == cell.length
            whole = frame.tokenizer.decode(prompt.ids[:-prompt.answer_len])
            told = FACT.findall(whole)
            answer = frame.tokenizer.decode(prompt.ids[-prompt.answer_len:]).strip()
            name = prompt.details["fact"]
            assert whole.count(answer) == (cell.control != NO_NEEDLE)
            assert re.search(rf"The pass key for {name} is ?$", whole)
            assert prompt.details["answer"] == f" {answer}"
            if cell.control == NO_NEEDLE:
                assert not told
                continue
            assert (name, answer) in told and len(dict(told)) == len(told)
            assert len(told) == (1 if cell.control == SINGLE else
                                 prompt.details["facts_in_view"])
            start = prompt.details["needle_position"]
            shown = frame.tokenizer.decode(prompt.ids[start:start + 60])
            assert shown.startswith(f"The pass key for {name} is {answer}")
            # Half a line to the nearest boundary, and a shared fact's place.
            assert abs(prompt.details["actual_depth"] - cell.depth) <= NEAR + line / 700


def test_questions_and_the_first_line_after_a_length_begin_lines():
    frame = make_frame("bytes")
    task = PasskeyStream(spot_checks=None, controls=False)
    cells = task.cells("s", LENGTHS, DEPTHS, 1)
    stream = task.stream(frame, cells[0], 0, 0)
    for question in stream.questions:
        assert frame.tokenizer.decode(stream.ids[:question.begin]).endswith("\n")


def test_facts_that_coincide_are_shared_and_counted():
    frame = make_frame("bytes")
    task = PasskeyStream(spot_checks=None, controls=False)
    cells = task.cells("s", LENGTHS, DEPTHS, 1)
    questions = task.stream(frame, cells[0], 0, 0).questions
    assert len(questions) == len(cells)
    users = {}
    for question in questions:
        users.setdefault(question.details["fact"], []).append(question)
    assert all(q.details["cells_of_fact"] == len(group) for group in users.values() for q in group)
    # The beginning is the same for all lengths; other places are not.
    assert sorted(map(len, users.values())) == [1] * 9 + [3]


def test_streams_differ_by_trial_and_seed_and_not_by_the_order_of_cells():
    frame = make_frame("bytes")
    task, other = PasskeyStream(), PasskeyStream()
    cells = task.cells("s", LENGTHS, DEPTHS, 2)
    other.cells("s", LENGTHS[::-1], DEPTHS[::-1], 2)
    forward = {cell.key: [p.ids.tolist() for p in task.prompts(frame, cell, 0)] for cell in cells}
    backward = {cell.key: [p.ids.tolist() for p in other.prompts(frame, cell, 0)]
                for cell in reversed(cells)}
    assert forward == backward
    first, second = forward[cells[5].key]
    assert first != second
    assert task.prompts(frame, cells[5], 1)[0].ids.tolist() not in (first, second)


def test_spot_checks_spread_over_the_grid():
    cells = PasskeyStream(controls=False, spot_checks=3).cells("s", LENGTHS, DEPTHS, 1)
    assert [(c.length, c.depth) for c in cells if c.control == SINGLE] == [
        (900, 0.5), (1500, 0.5), (2400, 0.5)]
    assert len({cell.key for cell in cells}) == len(cells)
    all_twice = PasskeyStream(controls=False, spot_checks=99).cells("s", LENGTHS, DEPTHS, 1)
    assert len(all_twice) == 2 * len(LENGTHS) * len(DEPTHS)


def test_slots_keep_facts_within_a_length():
    slots = plan_slots((100, 200), (0.0, 0.5, 1.0), 10, 20, 15, "s")
    assert slots.ends == [75, 175]
    # Of 200, depth 0.5 is 78 of 155 places: in the second part, which begins at 75.
    assert slots.targets == [0, 28, 55, 78, 155]
    assert slots.asked[200, 0.0] == slots.asked[100, 0.0] == 0
    # Where a fact would lie across the end of the first part it goes to its nearer side.
    assert plan_slots((100, 200), (0.45,), 10, 20, 15, "s").targets == [25, 75]
    assert plan_slots((100, 200), (0.4,), 10, 20, 15, "s").targets == [22, 55]


@pytest.mark.parametrize(("lengths", "message"), [
    ([200, 900], "a length of 200 leaves no room for a passage"),
    ([900, 920], "put more facts between two lengths than there are tokens")])
def test_lengths_without_room_are_refused(lengths, message):
    task = PasskeyStream()
    cells = task.cells("s", lengths, DEPTHS, 1)
    with pytest.raises(DataError, match=message):
        task.prompts(make_frame("bytes"), cells[0], 0)


def test_too_little_text_is_refused(text):
    task = PasskeyStream(haystack=text)
    cells = task.cells("s", [900, 60000], DEPTHS, 1)
    with pytest.raises(DataError, match="too few for a passage"):
        task.prompts(make_frame("bytes"), cells[0], 0)


def test_many_facts_have_names_of_two_words():
    frame = make_frame("bytes")
    task = PasskeyStream(controls=False, spot_checks=None)
    depths = [i / 89 for i in range(90)]
    cells = task.cells("s", [20000], depths, 1)
    questions = task.stream(frame, cells[0], 0, 0).questions
    names = {question.details["fact"] for question in questions}
    assert len(names) > 60 and all(" " in name for name in names)
    assert {question.begin + len(question.ids) for question in questions} == {20000}
