import json

import pytest

from extend.errors import DataError
from extend.transfer.rows import answered, read_prompts, retrieval_rows


def test_prompts_of_examples_are_read_without_their_answers(tokenizer, examples):
    lines = [json.loads(line)["prompt"] for line in examples.read_text().splitlines()]
    assert [tokenizer.decode(ids) for ids in read_prompts(tokenizer, examples)] == lines


def test_each_line_of_a_text_is_a_prompt(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo two.\n")
    assert [tokenizer.decode(p) for p in read_prompts(tokenizer, tmp_path)] == ["One.", "Two two."]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", "\n", "holds no prompts"),
    ("a.txt", "\n\n", "holds no prompts"),
    ("a.jsonl", '{"prompt": ""}', r"a.jsonl:1: 'prompt' must be a text that is not empty"),
    ("a.jsonl", '{"text": "x"}', r"a.jsonl:1: 'prompt' must be a text.*None"),
    ("a.parquet", "x", "prompts are read from .jsonl")])
def test_bad_prompts_are_named(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tokenizer, tmp_path / name)


def test_an_answer_is_what_counts():
    row = answered([5, 6], [7, 8, 9])
    assert row.ids == [5, 6, 7, 8, 9]
    assert row.scored == [False, False, True, True, True]


def test_digits_of_the_facts_are_what_counts_in_a_long_row(tokenizer):
    rows = retrieval_rows(tokenizer, length=256, count=3, seed=4, facts=(1,))
    for row in rows:
        assert len(row.ids) == len(row.scored) == 256
        answer = tokenizer.decode([i for i, s in zip(row.ids, row.scored, strict=True) if s])
        assert len(answer.strip()) == 5
        assert tokenizer.decode(row.ids).count(answer.strip()) == 2  # hidden, and asked for
    assert rows == retrieval_rows(tokenizer, length=256, count=3, seed=4, facts=(1,))
    assert rows != retrieval_rows(tokenizer, length=256, count=3, seed=5, facts=(1,))


def test_facts_are_hidden_in_given_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Word {n} of the text.\n" for n in range(60)))
    row, = retrieval_rows(tokenizer, length=300, count=1, seed=0, text=tmp_path, facts=(1,))
    assert "of the text.\n" in tokenizer.decode(row.ids)
    with pytest.raises(DataError, match="too few for a passage"):
        retrieval_rows(tokenizer, length=30000, count=1, seed=0, text=tmp_path)
