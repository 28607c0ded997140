"""RULER's question answering: SQuAD and HotpotQA among more and more other documents."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from extend.errors import DataError
from extend.evaluate.score import string_match_part
from extend.evaluate.tasks.ruler.fit import (
    Draft,
    Room,
    cut_parts,
    draw_fitting,
    largest_size,
    search_size,
)
from extend.evaluate.tasks.ruler.task import Ruler
from extend.evaluate.tasks.task import Prompt

_RULE = ("Answer the question based on the given documents. Only give me the answer and do not "
         "output any other words.\n\n")
_INTRO = f"{_RULE}The following are given documents.\n\n"
_STEP = 10


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the documents it comes with.

    Attributes:
        own: indices of the documents that are always there.
        near: indices of those that are added before any other.
    """

    text: str
    answers: list[str]
    own: list[int]
    near: list[int]


@dataclass(kw_only=True)
class _DocumentQuestions(Ruler):
    """Answer the first questions of a file, each among documents of the whole file."""

    new_tokens: ClassVar[int] = 32

    file: str
    _read: tuple[list[Question], list[str]] | None = field(default=None, init=False, repr=False)

    def inputs(self) -> dict[str, str]:
        return {"file": self.file}

    def grade(self, text: str, prompt: Prompt) -> float:
        """1 when the answer holds one of the references."""
        return string_match_part(text, prompt.details["references"])

    def parse(self, content: Any) -> tuple[list[Question], list[str]]:
        """Questions and documents of a file's content."""
        raise NotImplementedError

    def drafts(self, make_room: Callable[[Draft], Room], length: int, seed: int,
               where: str) -> Iterator[Draft]:
        questions, documents = self._content()
        rng = Random(seed)

        def draw_for(question: Question) -> Callable[[int], Draft]:
            return lambda size: _draw(rng, seed, question, documents, max(size, len(question.own)))

        draw = draw_for(questions[0])
        first = draw(_STEP)
        room = make_room(first)
        size = search_size(draw, room, _STEP, largest_size(room, first, _STEP))
        for number, question in enumerate(questions):
            yield draw_fitting(draw_for(question), room, size, _STEP,
                               f"{where}: question {number} of {self.file}")
        raise DataError(f"{where}: {self.file} has {len(questions)} questions; ask for as many "
                        "trials at most")

    def _content(self) -> tuple[list[Question], list[str]]:
        if self._read is None:
            try:
                content = json.loads(Path(self.file).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"{self.file}: cannot be read as JSON ({error})") from None
            try:
                self._read = self.parse(content)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{self.file}: not in the form that {self.name} reads "
                                f"({type(error).__name__}: {error}); give the published file"
                                ) from None
            if not self._read[0]:
                raise DataError(f"{self.file}: holds no question with an answer")
        return self._read


@dataclass(kw_only=True)
class Squad(_DocumentQuestions):
    """Questions on a paragraph of Wikipedia, first among those of the same article.

    Args:
        file: SQuAD 2.0 as published, for instance `dev-v2.0.json`.
    """

    name: ClassVar[str] = "ruler-qa_1"

    def parse(self, content: Any) -> tuple[list[Question], list[str]]:
        articles = [article["paragraphs"] for article in content["data"]]
        documents = sorted({paragraph["context"] for article in articles for paragraph in article})
        index = {text: i for i, text in enumerate(documents)}
        questions = []
        for article in articles:
            of_article = [index[paragraph["context"]] for paragraph in article]
            for own, paragraph in zip(of_article, article, strict=True):
                near = [i for i in of_article if i != own]
                questions += [
                    Question(qa["question"], [a["text"] for a in qa["answers"]], [own], near)
                    for qa in paragraph["qas"] if not qa.get("is_impossible")]
        return questions, documents


@dataclass(kw_only=True)
class Hotpot(_DocumentQuestions):
    """Questions that take two paragraphs of Wikipedia, among ten of the question's own.

    Args:
        file: HotpotQA as published, for instance `hotpot_dev_distractor_v1.json`.
    """

    name: ClassVar[str] = "ruler-qa_2"

    def parse(self, content: Any) -> tuple[list[Question], list[str]]:
        rows = [[f"{title}\n{''.join(text)}" for title, text in row["context"]] for row in content]
        documents = sorted({text for texts in rows for text in texts})
        index = {text: i for i, text in enumerate(documents)}
        questions = [Question(row["question"], [row["answer"]], [index[t] for t in texts], [])
                     for row, texts in zip(content, rows, strict=True)]
        return questions, documents


def _draw(rng: Random, seed: int, question: Question, documents: Sequence[str],
          size: int) -> Draft:
    """A question among so many documents: its own, those near, then any, at last all again."""
    if size < len(documents):
        missing = size - len(question.own)
        if missing > len(question.near):
            taken = {*question.own, *question.near}
            others = [i for i in range(len(documents)) if i not in taken]
            added = question.near + rng.sample(others, missing - len(question.near))
        else:
            added = rng.sample(question.near, missing)
        shown = [documents[i] for i in question.own + added]
    else:
        shown = [documents[i % len(documents)] for i in range(size)]
    Random(seed).shuffle(shown)
    numbered = [f"Document {i}:\n{text}\n\n" for i, text in enumerate(shown, start=1)]
    return Draft(cut_parts([_INTRO, *numbered, _RULE, f"Question: {question.text}"]), " Answer:",
                 question.answers)
