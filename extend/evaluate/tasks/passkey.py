"""Passkey: one number hidden in long text and asked for at its end."""

import random
from dataclasses import dataclass, field
from typing import ClassVar

from extend.evaluate.frame import Frame
from extend.evaluate.tasks.lines import Lines
from extend.evaluate.tasks.needle import NeedleTask, Numbers, Quiz, Text
from extend.haystack import INTRO

NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION, PREFILL = "What is the pass key?", " The pass key is"
_MANY = ("There are many pass keys below, each with a number. Find them and memorize them. I will "
         "quiz you about one of them.\n")
_NUMBERED = "Pass key number {number} is {key}.\n"


@dataclass(kw_only=True)
class Passkey(NeedleTask):
    """Find a number of five digits in repeated filler sentences.

    Source: Mohtashami & Jaggi 2023, arXiv:2305.16300, section 4.2.
    """

    name: ClassVar[str] = "passkey"

    def quiz(self, rng: random.Random, numbers: Numbers) -> Quiz:
        key = numbers.draw(rng)
        return Quiz(intro=INTRO, facts=[NEEDLE.format(key=key)], keys=[key], question=QUESTION,
                    prefill=PREFILL, answer=f" {key}")


@dataclass(kw_only=True)
class PasskeyText(Passkey):
    """Find a number of five digits in real text. Harder than in filler, and closer to use.

    Args:
        haystack: file or folder of text (see `extend.documents`) that the model was not trained
            on; tokenised once a run.
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    name: ClassVar[str] = "passkey-text"

    haystack: str
    column: str = "text"
    _text: Text | None = field(default=None, init=False, repr=False)

    def text(self) -> Text:
        if self._text is None:
            self._text = Text(path=self.haystack, column=self.column)
        return self._text


@dataclass(kw_only=True)
class PasskeyHard(NeedleTask):
    """Find one of very many numbered pass keys: everything around the fact looks like it.

    Numbers have six digits and keys seven, so that neither is guessed nor mistaken for the other;
    the order of the numbers says nothing. A model that reads the format and picks any key is right
    once in `in_view` trials.

    Source: the harder passkey evaluation of Peng et al. 2023, arXiv:2309.00071 (jquesnelle/yarn,
    eval/passkey_hard.py at 995db5b).
    """

    name: ClassVar[str] = "passkey-hard"
    width: ClassVar[int] = 7
    chance: ClassVar[float] = 1 / 9_000_000

    def quiz(self, rng: random.Random, numbers: Numbers) -> Quiz:
        number, key = Numbers(6, (), self.name).draw(rng), numbers.draw(rng)
        return Quiz(intro=_MANY, facts=[_NUMBERED.format(number=number, key=key)], keys=[key],
                    question=f"What is pass key number {number}?",
                    prefill=f" Pass key number {number} is", answer=f" {key}",
                    taken=(number, key))

    def source(self, frame: Frame, length: int, quiz: Quiz) -> Lines:
        labels, keys = Numbers(6, quiz.taken, self.name), Numbers(7, quiz.taken, self.name)
        return Lines(frame.tokenizer, lambda rng: _NUMBERED.format(
            number=labels.draw(rng), key=keys.draw(rng)), self.name)
