"""Rows of token ids and what is scored of them: answers to prompts, and facts in long text."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from extend.documents import TEXT_SUFFIXES, list_files, read_documents, read_json_lines
from extend.errors import DataError
from extend.haystack import Haystack, encode, prefix_ids
from extend.retrieval.rows import RetrievalRows


class Row(NamedTuple):
    """Token ids, and for each whether its prediction counts; the first is never predicted."""

    ids: list[int]
    scored: list[bool]


def read_prompts(tokenizer: Any, path: Path | str) -> list[list[int]]:
    """Token ids of every prompt, with the special tokens that begin a text.

    A JSON line holds one under `prompt`, as the files of examples and of the exact-match task do;
    whatever else it holds, such as the answer, is not read. In a text file each line is one.

    Raises:
        DataError: no prompt, one without any token, or a file of another kind.
    """
    prefix, prompts = prefix_ids(tokenizer), []
    for where, text in _prompt_texts(path):
        ids = prefix + encode(tokenizer, text)
        if not ids:
            raise DataError(f"{where}: the prompt {text!r} has no tokens to answer from")
        prompts.append(ids)
    if not prompts:
        raise DataError(f"{path}: holds no prompts; give some, or let the target write its own")
    return prompts


def _prompt_texts(path: Path | str) -> Iterator[tuple[str, str]]:
    for file in list_files(path):
        if file.suffix == ".jsonl":
            for where, row in read_json_lines(file):
                if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                    raise DataError(f"{where}: 'prompt' must be a text that is not empty, it is "
                                    f"{row.get('prompt')!r}")
                yield where, row["prompt"]
        elif file.suffix in TEXT_SUFFIXES:
            for text in read_documents(file):
                yield from ((f"{file}:{number}", line)
                            for number, line in enumerate(text.splitlines(), start=1) if line)
        else:
            raise DataError(f"{file}: prompts are read from .jsonl and {', '.join(TEXT_SUFFIXES)}")


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    """A prompt and what followed it, which is what counts."""
    return Row([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def retrieval_rows(tokenizer: Any, *, length: int, count: int, seed: int,
                   text: Path | str | None = None, facts: Sequence[int] = (1, 8)) -> list[Row]:
    """Rows of `length` tokens with facts hidden at random places, asked for at the end.

    They are the `named` rows of training; the digits of the answers count.

    Args:
        text: file or folder to hide the facts in; None means repeated filler sentences.
        facts: how many a row holds; each row draws one of these.

    Raises:
        DataError: text too short for such rows, or rows too short for the facts.
    """
    haystack = (Haystack.filler(tokenizer, length) if text is None else
                Haystack.from_texts(tokenizer, read_documents(text), str(text)))
    rows = RetrievalRows(tokenizer, haystack, prefix_ids(tokenizer), facts, "named")
    rows.check(length)
    rng = random.Random(f"{seed}/retrieval")
    built = [rows.build(length, rng) for _ in range(count)]
    return [Row(ids.tolist(), answers.tolist()) for ids, answers in built]
