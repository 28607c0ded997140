import re

import pytest

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks import TASKS, Cell
from extend.evaluate.tasks.passkey import check_leaks, draw_key
from extend.evaluate.tasks.task import NO_NEEDLE, derive, occurrences
from extend.haystack import INTRO
from tests.tiny_text import KINDS, make_tokenizer, write_text

NEEDLE = re.compile(r"The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.\n")
QUESTION = "What is the pass key? The pass key is"


def task_of(name: str, text_file=None):
    return TASKS[name](**({"haystack": str(text_file)} if name == "passkey-text" else {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["passkey", "passkey-text"])
@pytest.mark.parametrize("length", [300, 601, 2048])
def test_prompts_are_exact_and_whole(kind, name, length, text_file):
    tokenizer = make_tokenizer(kind)
    task = task_of(name, text_file)
    for depth in (0.0, 0.37, 1.0):
        prompts = task.prompts(Frame.of(tokenizer), Cell("x", name, length, depth, 3), seed=1)
        assert [len(p.ids) for p in prompts] == [length] * 3
        for prompt in prompts:
            text = tokenizer.decode(prompt.ids, skip_special_tokens=True)
            key = prompt.details["answer"].strip()
            assert text.startswith(INTRO) and text.endswith(f"{QUESTION} {key}")
            # A token of white space alone is given; one that also holds a digit is asked for.
            assert tokenizer.decode(prompt.ids[-prompt.answer_len:]).lstrip() == key
            assert NEEDLE.findall(text) == [(key, key)]
            assert text.count(key) == 3  # twice in the fact, once as the answer
        assert len({p.details["answer"] for p in prompts}) == 3
    has_bos = prompts[0].ids[0] == tokenizer.bos_token_id
    assert has_bos == (kind == "bytes-bos")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["passkey", "passkey-text"])
def test_depth_is_within_a_line_of_what_was_asked(kind, name, text_file):
    tokenizer = make_tokenizer(kind)
    length = 3000
    task = task_of(name, text_file)
    longest_line = 120  # characters: the filler's 115, and the longest of the text's
    for i in range(10):
        cell = Cell("x", name, length, i / 9, 2)
        for prompt in task.prompts(Frame.of(tokenizer), cell, seed=0):
            details = prompt.details
            rest = tokenizer.decode(prompt.ids[details["needle_position"]:])
            assert NEEDLE.match(rest).group(1) == details["answer"].strip()
            before = tokenizer.decode(prompt.ids[:details["needle_position"]],
                                      skip_special_tokens=True)
            assert before == INTRO or before.endswith("\n")
            # Every tokenizer here has at most one token a character.
            assert abs(details["actual_depth"] - cell.depth) <= longest_line / (length - 400)


def test_prompts_depend_on_seed_and_cell_alone(text_file):
    tokenizer = make_tokenizer("bytes")
    cells = [Cell("x", "passkey-text", n, d, 2) for n in (600, 1200) for d in (0.0, 0.5, 1.0)]
    forward = [task_of("passkey-text", text_file).prompts(Frame.of(tokenizer), c, 7) for c in cells]
    task = task_of("passkey-text", text_file)
    backward = [task.prompts(Frame.of(tokenizer), c, 7) for c in reversed(cells)][::-1]
    assert forward == backward
    keys = [p.details["answer"] for prompts in forward for p in prompts]
    assert len(set(keys)) == len(keys)
    other = task.prompts(Frame.of(tokenizer), cells[0], 8)
    assert other != forward[0]
    fewer = task.prompts(Frame.of(tokenizer), Cell("y", "passkey-text", 600, 0.0, 1), 7)
    assert fewer == forward[0][:1]  # neither the label nor the number of trials matters


def test_seed_gives_the_same_numbers_on_every_machine():
    # Written down once: a change here makes results of other versions incomparable.
    assert derive(0, "passkey", 1024, "0.500000", 0, "key", 0) == 2677104706401853069


def test_control_has_no_key():
    tokenizer = make_tokenizer("bytes")
    task = task_of("passkey")
    cells = task.cells("x", [600, 300], [0.0, 1.0], 4)
    assert [(c.length, c.depth, c.control) for c in cells] == [
        (600, 0.0, None), (600, 1.0, None), (300, 0.0, None), (300, 1.0, None),
        (300, None, NO_NEEDLE)]
    for prompt in task.prompts(Frame.of(tokenizer), cells[-1], 0):
        text = tokenizer.decode(prompt.ids)
        assert len(prompt.ids) == 300 and text.count(prompt.details["answer"].strip()) == 1
        assert "Remember it" not in text
    assert len(TASKS["passkey"](controls=False).cells("x", [300], [0.0], 1)) == 1


def test_numbers_of_the_text_are_never_keys(tmp_path):
    tokenizer = make_tokenizer("bytes")
    file = write_text(tmp_path / "x.txt", 100)
    with file.open("a") as f:
        f.writelines(f"{n}\n" for n in range(10_000, 100_000, 3))
    task = task_of("passkey-text", file)
    answers = {p.details["answer"] for d in range(11)
               for p in task.prompts(Frame.of(tokenizer),
                                     Cell("x", "passkey-text", 500, d / 10, 4), 0)}
    assert len(answers) == 44
    assert all(int(answer) % 3 != 10_000 % 3 for answer in answers)


def test_text_with_every_number_is_refused():
    with pytest.raises(DataError, match="the text holds 90000 of the 90000"):
        draw_key(0, ("passkey-text",), 0, {str(n) for n in range(10_000, 100_000)}, set())


def test_too_short_is_refused_with_both_lengths():
    tokenizer = make_tokenizer("bytes")
    parts = len(INTRO) + len("The pass key is 12345. Remember it. 12345 is the pass key.\n") \
        + len(QUESTION) + len(" 12345")
    task = task_of("passkey")
    with pytest.raises(DataError, match=f"a length of {parts} leaves no room .* take {parts} "):
        task.prompts(Frame.of(tokenizer), Cell("x", "passkey", parts, 0.5, 1), 0)
    shortest, = task.prompts(Frame.of(tokenizer), Cell("x", "passkey", parts + 1, 0.5, 1), 0)
    assert len(shortest.ids) == parts + 1


def test_too_little_text_is_refused(tmp_path):
    task = task_of("passkey-text", write_text(tmp_path / "x.txt", 20))
    with pytest.raises(DataError, match="too few for a passage of"):
        task.prompts(Frame.of(make_tokenizer("bytes")), Cell("x", "passkey-text", 9000, 0.5, 1), 0)


def test_leaks_are_found():
    cell = Cell("x", "passkey", 9, 0.5, 1)
    check_leaks(cell, [1, 2, 7, 8, 3, 9, 4, 7, 8], [7, 8, 3], [7, 8], 2)
    with pytest.raises(DataError, match="8 tokens instead of 9"):
        check_leaks(cell, [1] * 8, [], [2], 0)
    with pytest.raises(DataError, match=r"the fact is at \[0, 3\]"):
        check_leaks(cell, [7, 3, 0, 7, 3, 0, 0, 0, 7], [7, 3], [7], 3)
    with pytest.raises(DataError, match=r"answer \[7, 8\] also occur at \[5\]"):
        check_leaks(cell, [1, 2, 7, 8, 3, 7, 8, 7, 8], [7, 8, 3], [7, 8], 2)


def test_occurrences_may_overlap():
    assert occurrences([1, 1, 1, 2, 1, 1], [1, 1]) == [0, 1, 4]
    assert occurrences([1, 2], [1, 2, 3]) == []
