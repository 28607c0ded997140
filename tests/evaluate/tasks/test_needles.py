"""Every task that hides facts, over real tokenizers of different kinds, plain and in a chat."""

import json
import os
import random
import re
import subprocess
import sys

import pytest

from extend.errors import DataError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks import TASKS, Cell
from extend.evaluate.tasks.multi_needle import MultiValue
from extend.evaluate.tasks.needle import NeedleTask, Numbers, check_leaks
from extend.evaluate.tasks.task import NO_CONTEXT, NO_NEEDLE, Prompt
from tests.real_tokenizers import MADE, REAL, load, without_digits
from tests.tiny_text import make_tokenizer

HIDING = [name for name, kind in TASKS.items() if issubclass(kind, NeedleTask)]
MODES = ("base", "chat")


def make(name, text_file=None):
    needs_text = name == "passkey-text"
    return TASKS[name](**({"haystack": str(text_file)} if needs_text else {}))


def squeeze(text):
    """Without white space, which a WordPiece tokenizer does not keep."""
    return re.sub(r"\s+", "", text)


def keys_of(prompt):
    answer = prompt.details.get("answer")
    return prompt.details["references"] if answer is None else answer.strip().split(", ")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokenizer", [*REAL, *MADE])
@pytest.mark.parametrize("name", HIDING)
def test_prompts_are_exact_and_hold_each_key_where_they_say(name, tokenizer, mode, text_file):
    frame = Frame.of(load(tokenizer), mode)
    task = make(name, text_file)
    seen = set()
    for length, depth in ((1300, 0.4), (1601, 1.0)):
        cell = task.cells("x", [length], [depth], 2)[0]
        for prompt in task.prompts(frame, cell, 1):
            assert prompt.length == length and all(type(i) is int for i in prompt.ids)
            asked = prompt.ids[:len(prompt.ids) - prompt.answer_len]
            text = squeeze(frame.tokenizer.decode(asked))
            answer = squeeze(frame.tokenizer.decode(prompt.ids[len(asked):]))
            keys = keys_of(prompt)
            times = 2 if name.startswith("passkey") and name != "passkey-hard" else 1
            assert [text.count(squeeze(key)) for key in keys] == [times] * len(keys)
            assert answer == (",".join(keys) if prompt.answer_len else "")
            assert not seen & set(keys) and len(set(keys)) == len(keys)
            seen |= set(keys)
            for key, place in zip(keys, prompt.details.get(
                    "needle_positions", [prompt.details.get("needle_position")]), strict=True):
                fact = squeeze(frame.tokenizer.decode(asked[place:place + 200]))
                assert key in fact and re.match("(The|One|Pass|\")", fact)


@pytest.mark.parametrize("tokenizer", [*REAL, *MADE])
@pytest.mark.parametrize("name", HIDING)
def test_controls_hold_no_key(name, tokenizer, text_file):
    frame = Frame.of(load(tokenizer), "chat")
    task = make(name, text_file)
    cells = {c.control: c for c in task.cells("x", [1900, 1600], [0.0, 1.0], 2) if c.control}
    assert set(cells) == {NO_NEEDLE, NO_CONTEXT} and 0 < task.chance < 1e-3
    for control, cell in cells.items():
        for prompt in task.prompts(frame, cell, 0):
            asked = squeeze(frame.tokenizer.decode(
                prompt.ids[:len(prompt.ids) - prompt.answer_len]))
            assert not any(squeeze(key) in asked for key in keys_of(prompt))
            assert cell.length == 1600 and (prompt.length == 1600 or control == NO_CONTEXT)
            assert prompt.length <= 400 or control == NO_NEEDLE
    assert all(c.control is None for c in TASKS["multi-key"](controls=False).cells(
        "x", [500], [0.0], 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokenizer", REAL)
@pytest.mark.parametrize("name", ["passkey", "passkey-hard", "kv-json", "multi-query"])
def test_no_seam_between_parts_can_be_seen(name, tokenizer, mode):
    """From the first fact on, the ids are those of the tokenised text as a whole."""
    frame = Frame.of(load(tokenizer), mode)
    prompt = make(name).prompts(frame, make(name).cells("x", [1300], [0.3], 1)[0], 0)[0]
    first = min(prompt.details.get("needle_positions", [prompt.details.get("needle_position")]))
    ids = prompt.ids[first:]
    text = frame.tokenizer.decode(ids)
    assert ids == frame.encode(text, after_line=True)


@pytest.mark.parametrize("tokenizer", [*REAL, "unigram"])
@pytest.mark.parametrize("name", ["passkey", "passkey-text", "passkey-hard", "multi-key"])
def test_depth_is_that_of_the_nearest_boundary(name, tokenizer, text_file):
    frame = Frame.of(load(tokenizer))
    task, length = make(name, text_file), 1500
    for depth in (0.0, 0.13, 0.5, 0.77, 1.0):
        prompt, = task.prompts(frame, Cell("x", name, length, depth, 1), 3)
        place = prompt.details["needle_position"]
        before = frame.tokenizer.decode(prompt.ids[:place])
        assert before.endswith("\n")
        # No line here has more than 60 tokens, so no boundary is more than 30 from any place.
        assert abs(prompt.details["actual_depth"] - depth) <= 40 / (length - 150) or depth in (0, 1)
    assert prompt.details["actual_depth"] == 1.0 or name == "multi-key"


def build_all(text_file):
    """Task -> ids and details of its first cell."""
    frame, built = Frame.of(make_tokenizer("bytes-bos")), {}
    for name in HIDING:
        task = make(name, text_file)
        prompts = task.prompts(frame, task.cells("x", [3000], [0.25], 2)[0], 5)
        built[name] = [[prompt.ids, prompt.details] for prompt in prompts]
    return json.loads(json.dumps(built))


def test_prompts_are_the_same_in_another_process(text_file):
    code = ("import json, sys; from tests.evaluate.tasks.test_needles import build_all; "
            "print(json.dumps(build_all(sys.argv[1])))")
    far = subprocess.run([sys.executable, "-c", code, str(text_file)], capture_output=True,
                         text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert json.loads(far.stdout) == build_all(text_file)


@pytest.mark.parametrize("name", HIDING)
def test_prompts_depend_on_seed_and_cell_alone(name, text_file):
    task, frame = make(name, text_file), Frame.of(load("unigram"))
    cells = task.cells("x", [1500, 1700], [0.25, 0.5], 2)
    onward = [task.prompts(frame, cell, 5) for cell in cells]
    assert onward == [make(name, text_file).prompts(frame, c, 5) for c in reversed(cells)][::-1]
    assert onward[0] != task.prompts(frame, cells[0], 6)
    assert onward[0][:1] == task.prompts(frame, Cell("y", name, 1500, cells[0].depth, 1), 5)


@pytest.mark.parametrize("name", HIDING)
def test_what_has_no_room_is_refused(name, text_file):
    frame = Frame.of(load("unigram"))
    task = make(name, text_file)
    with pytest.raises(DataError, match=r"(leaves no room for a passage|ask for a longer length)"):
        task.prompts(frame, task.cells("x", [110], [0.5], 1)[0], 0)


def test_a_key_that_the_tokenizer_cannot_write_is_refused():
    frame = Frame.of(without_digits())
    with pytest.raises(DataError, match=r"cannot write the key '\d{5}'.* gives '\[UNK\]'"):
        TASKS["passkey"]().prompts(frame, Cell("x", "passkey", 900, 0.5, 1), 0)


def test_keys_in_view_are_counted():
    frame = Frame.of(load("smollm2"))
    for name, count in (("multi-key", 8), ("multi-query", 8), ("multi-value", 8),
                        ("number-needle", 1), ("passkey-hard", None), ("kv-json", None)):
        task = make(name)
        prompt, = task.prompts(frame, task.cells("x", [1500], [0.5], 1)[0], 0)
        text = frame.tokenizer.decode(prompt.ids[:len(prompt.ids) - prompt.answer_len])
        if name == "passkey-hard":
            lines = re.findall(r"Pass key number (\d{6}) is (\d{7})\.", text)
            assert len(set(lines)) == len({n for n, _ in lines}) == len({k for _, k in lines})
            count = len(lines)
        if name == "kv-json":
            pairs = json.loads(text[text.index("{"):text.index("}") + 1])
            count = len(pairs) - 1  # the last is never asked for
        assert prompt.details["in_view"] == count


def test_options_change_what_is_hidden():
    frame = Frame.of(load("smollm2"))
    many, = TASKS["number-needle"](distractors=5).prompts(
        frame, Cell("x", "number-needle", 900, 0.5, 1), 0)
    assert frame.tokenizer.decode(many.ids).count("The special magic") == 7
    with pytest.raises(RecipeError, match="queries: 9 is not between 2 and 8"):
        TASKS["multi-query"](queries=9)
    with pytest.raises(RecipeError, match="distractors: 500"):
        TASKS["number-needle"](distractors=500)
    assert TASKS["multi-query"](queries=3).chance == pytest.approx(90_000 ** -3)


def test_grades_are_shares_of_the_first_numbers():
    prompt = Prompt([1], 0, {"references": ["11111", "22222", "33333", "44444"]}, 50)
    grade = MultiValue().grade
    assert grade(" 44444, 22222, 11111 and 33333.", prompt) == 1.0
    assert grade("11111 11111 11111 11111 22222", prompt) == 0.5
    assert grade("99999, 88888, 77777, 66666, 11111, 22222, 33333, 44444", prompt) == 0.0
    assert grade("1111122222 3333344444", prompt) == 0.0
    assert grade("", prompt) == 0.0


def test_numbers_are_unique_and_never_those_of_the_text():
    numbers = Numbers(2, {str(n) for n in range(10, 100) if n % 10}, "notes.txt")
    rng = random.Random(0)
    assert sorted(numbers.draw(rng) for _ in range(9)) == [str(n) for n in range(10, 100, 10)]
    with pytest.raises(DataError, match=r"notes\.txt: 81 of the 90 .* 9 are in use"):
        numbers.draw(rng)


def test_leaks_are_found():
    cell = Cell("x", "passkey", 9, 0.5, 1)
    fact = [(2, [7, 8, 3])]
    check_leaks(cell, Prompt([1, 2, 7, 8, 3, 9, 4, 7, 8], 2), fact, [[7, 8]])
    check_leaks(cell, Prompt([1, 2, 7, 8, 3, 9], 0, {}, 3), fact, [[7, 8]])
    with pytest.raises(DataError, match="8 tokens instead of 9"):
        check_leaks(cell, Prompt([1] * 8, 1), [], [[2]])
    with pytest.raises(DataError, match=r"a fact is at \[0, 3\]"):
        check_leaks(cell, Prompt([7, 3, 0, 7, 3, 0, 0, 0, 7], 1), [(3, [7, 3])], [[7]])
    with pytest.raises(DataError, match=r"answer \[7, 8\] also occur at \[5\]"):
        check_leaks(cell, Prompt([1, 2, 7, 8, 3, 7, 8, 7, 8], 2), fact, [[7, 8]])
