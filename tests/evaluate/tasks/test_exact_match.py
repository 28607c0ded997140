import json

import pytest

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks import TASKS
from tests.tiny_text import KINDS, make_tokenizer

ROWS = [{"prompt": "reverse 12345:", "answer": " 54321\n", "id": 3}, {"prompt": "a", "answer": "b"}]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "skill.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_prompt_and_answer(kind, file):
    tokenizer = make_tokenizer(kind)
    task = TASKS["exact-match"](file=str(file))
    cell, = task.cells("skill", (), (), 0)
    assert (cell.length, cell.depth, cell.trials) == (None, None, 2)
    for prompt, row in zip(task.prompts(Frame.of(tokenizer), cell, 0), ROWS, strict=True):
        assert prompt.ids == tokenizer(row["prompt"] + row["answer"])["input_ids"]
        wanted = tokenizer.decode(prompt.ids[-prompt.answer_len:])
        assert wanted.endswith(row["answer"].lstrip(" "))  # a lone leading space is given
        assert prompt.details == {"answer": row["answer"]}


def test_limit_takes_the_first_rows(file):
    cell, = TASKS["exact-match"](file=str(file), limit=1).cells("skill", (), (), 0)
    assert cell.trials == 1


@pytest.mark.parametrize(("line", "message"), [
    ('{"prompt": "a"}', "skill.jsonl:1: 'answer' must be a text that is not empty, it is None"),
    ('{"prompt": "a", "answer": ""}', "'answer' must be a text"),
    ('{"prompt": 3, "answer": "b"}', "'prompt' must be a text that is not empty, it is 3"),
    ("", "holds no lines"),
])
def test_bad_rows_are_named(tmp_path, line, message):
    (tmp_path / "skill.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        TASKS["exact-match"](file=str(tmp_path / "skill.jsonl")).cells("skill", (), (), 0)
