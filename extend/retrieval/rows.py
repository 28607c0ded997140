"""Rows with facts hidden in a haystack and asked for at the end."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extend.errors import DataError
from extend.haystack import INTRO, Haystack, encode, hide, split_answer
from extend.retrieval.forms import FORMS, VALUES, Form
from extend.retrieval.names import NAMES


@dataclass(frozen=True)
class Quiz:
    """What surrounds a passage: token ids of the intro, the facts, and the questions.

    `answers` marks, token by token of `questions`, what the model has to recall.
    """

    intro: list[int]
    facts: list[list[int]]
    questions: list[int]
    answers: list[bool]

    @property
    def num_tokens(self) -> int:
        return len(self.intro) + sum(map(len, self.facts)) + len(self.questions)


def _random_key(rng: random.Random) -> str:
    return str(rng.randrange(10000, 100000))


def named_quiz(tokenizer: Any, num_facts: int, rng: random.Random) -> Quiz:
    """Facts that each have a name, asked for in another order than they were given."""
    keys = {name: _random_key(rng) for name in rng.sample(NAMES, num_facts)}
    return _ask(tokenizer, FORMS[0], keys, rng)


def varied_quiz(tokenizer: Any, num_facts: int, rng: random.Random) -> Quiz:
    """As `named_quiz`, in a wording and with a kind of values that each row draws."""
    form, value = rng.choice(FORMS), rng.choice(VALUES)
    keys = {name: value(rng) for name in rng.sample(NAMES, num_facts)}
    return _ask(tokenizer, form, keys, rng)


def _ask(tokenizer: Any, form: Form, keys: Mapping[str, str], rng: random.Random) -> Quiz:
    facts = [encode(tokenizer, form.fact.format(name=name, value=key) + "\n")
             for name, key in keys.items()]
    full_stop = encode(tokenizer, ".\n")
    questions, answers = [], []
    for name in rng.sample(list(keys), len(keys)):
        question = form.question.format(name=name)
        prompt, answer = split_answer(tokenizer, question, f" {keys[name]}")
        questions += prompt + answer + full_stop
        answers += [False] * len(prompt) + [True] * len(answer) + [False] * len(full_stop)
    return Quiz([], facts, questions, answers)


def classic_quiz(tokenizer: Any, num_facts: int, rng: random.Random) -> Quiz:
    """The single fact of the passkey test, in the wording of the evaluation."""
    if num_facts != 1:
        raise DataError(f"retrieval: template 'classic' has one fact, not {num_facts}; set facts "
                        "to [1] or use template 'named'")
    key = _random_key(rng)
    fact = encode(tokenizer, f"The pass key is {key}. Remember it. {key} is the pass key.\n")
    prompt, answer = split_answer(tokenizer, "What is the pass key? The pass key is", f" {key}")
    return Quiz(encode(tokenizer, INTRO), [fact], prompt + answer,
                [False] * len(prompt) + [True] * len(answer))


def draw_depths(num_facts: int, rng: random.Random) -> list[float]:
    """Random depths, in a quarter of the rows one of them 0.

    The very beginning, where attention also rests that looks for nothing, is what passkey grids
    ask for and chance hardly ever gives: a model that was never taught a fact there forgets it.
    """
    depths = [rng.random() for _ in range(num_facts)]
    if rng.random() < 0.25:
        depths[rng.randrange(num_facts)] = 0.0
    return depths


TEMPLATES: dict[str, Callable[[Any, int, random.Random], Quiz]] = {
    "named": named_quiz,
    "varied": varied_quiz,
    "classic": classic_quiz,
}


_DRAWS = 100  # of questions, for a row that they do not fit


@dataclass(frozen=True)
class RetrievalRows:
    """Builds retrieval rows.

    Attributes:
        prefix: special tokens before a text (a BOS, or nothing).
        facts: how many facts a row holds; each row draws one of these.
    """

    tokenizer: Any
    haystack: Haystack
    prefix: Sequence[int]
    facts: Sequence[int]
    template: str

    def check(self, length: int) -> None:
        """Raise DataError when a row of `length` tokens cannot be built."""
        if max(self.facts) > len(NAMES):
            raise DataError(f"retrieval: {max(self.facts)} facts in a row, but there are only "
                            f"{len(NAMES)} names; ask for fewer")
        for num_facts in self.facts:
            self._build(length, num_facts, random.Random(0))

    def build(self, length: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [length] and answer mask bool [length] of one row."""
        return self._build(length, rng.choice(list(self.facts)), rng)

    def _build(self, length: int, num_facts: int,
               rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(_DRAWS):  # some wordings are longer than others
            quiz = TEMPLATES[self.template](self.tokenizer, num_facts, rng)
            room = length - len(self.prefix) - quiz.num_tokens
            if room >= 0:
                break
        else:
            raise DataError(f"retrieval: {num_facts} facts and their questions take "
                            f"{length - room} tokens, more than a row of {length}; ask for fewer "
                            "facts or longer rows")
        passage = self.haystack.window(room, rng)
        body, _ = hide(passage, quiz.facts, draw_depths(num_facts, rng))
        ids = np.asarray([*self.prefix, *quiz.intro, *body, *quiz.questions], dtype=np.int64)
        answers = np.zeros(length, dtype=bool)
        answers[length - len(quiz.answers):] = quiz.answers
        return ids, answers
