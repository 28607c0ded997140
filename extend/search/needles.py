"""Rows that hide facts and ask for them at the end: what the needle-answer loss is taken on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from extend.errors import DataError
from extend.haystack import INTRO, Haystack, encode, hide, prefix_ids, split_answer

NAMES = ("anchor", "basket", "candle", "desert", "engine", "falcon", "garden", "hammer", "island",
         "jacket", "kettle", "ladder", "mirror", "needle", "orange", "pepper", "rocket", "saddle",
         "temple", "velvet", "window", "yellow", "bridge", "castle")
MAX_FACTS = 16
_SHARE = 3  # facts and questions take at most one part in so many of a row
# With one fact, the wording of the passkey test (Mohtashami & Jaggi 2023, arXiv:2305.16300).
_SINGLE_FACT = "The pass key is {key}. Remember it. {key} is the pass key.\n"
_SINGLE_QUESTION = "What is the pass key? The pass key is"
_FACT = "The pass key for {name} is {key}.\n"
_QUESTION = "What is the pass key for {name}? The pass key for {name} is"


@dataclass(frozen=True, slots=True)
class NeedleRow:
    """A row of exact length.

    Attributes:
        ids: token ids.
        answers: for each fact, in the order of the facts' depths, the (begin, end) of its answer.
        depths: where each fact is, as a share of the row.
        source: text or filler.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    depths: list[float]
    source: str


@dataclass(frozen=True, slots=True)
class _Quiz:
    intro: list[int]
    facts: list[list[int]]
    questions: list[int]
    answers: list[tuple[int, int]]  # in `questions`, in the order of `facts`

    @property
    def num_tokens(self) -> int:
        return len(self.intro) + len(self.questions) + sum(map(len, self.facts))


def fitting_facts(tokenizer: Any, length: int, wanted: int) -> int:
    """How many facts of `wanted` a row of `length` can hold and leave two thirds to the text.

    At least two where more than one are wanted: a single fact has another wording.
    """
    if wanted == 1:
        return 1
    size = _named_quiz(tokenizer, wanted, random.Random(0)).num_tokens / wanted
    return max(2, min(wanted, int(length / _SHARE / size)))


def build_rows(tokenizer: Any, haystacks: dict[str, Haystack], length: int, *, num_rows: int,
               num_facts: int, rng: random.Random) -> list[NeedleRow]:
    """Rows of `length` tokens, the haystacks in turn.

    Args:
        haystacks: source -> what the facts are hidden in.
        num_facts: of each row; 1 takes the wording of the passkey test. Depths are drawn from
            equal shares of the row, over all rows of a source when there is one fact a row.

    Raises:
        DataError: text or length too short.
    """
    sources = list(haystacks)
    per_source = -(-num_rows // len(sources))
    rows = []
    for number in range(num_rows):
        source = sources[number % len(sources)]
        share = number // len(sources)
        depths = [(share + rng.random()) / per_source] if num_facts == 1 else [
            (j + rng.random()) / num_facts for j in range(num_facts)]
        rows.append(_build(tokenizer, haystacks[source], source, length, depths, rng))
    return rows


def _build(tokenizer: Any, haystack: Haystack, source: str, length: int, depths: Sequence[float],
           rng: random.Random) -> NeedleRow:
    make = _single_quiz if len(depths) == 1 else _named_quiz
    quiz = make(tokenizer, len(depths), rng)
    head = prefix_ids(tokenizer) + quiz.intro
    room = length - len(head) + len(quiz.intro) - quiz.num_tokens
    if room < 1:
        raise DataError(f"rows of {length} tokens have no room for {len(depths)} facts and their "
                        f"questions, {quiz.num_tokens} tokens; ask for fewer needles")
    body, starts = hide(haystack.window(room, rng), quiz.facts, depths)
    ids = head + body + quiz.questions
    begin = len(ids) - len(quiz.questions)
    return NeedleRow(ids, [(begin + low, begin + high) for low, high in quiz.answers],
                     [(len(head) + start) / length for start in starts], source)


def _named_quiz(tokenizer: Any, count: int, rng: random.Random) -> _Quiz:
    """Facts that each have a name, asked for in another order than they were given."""
    names = rng.sample(NAMES, count)
    keys = [_draw_key(rng) for _ in names]
    facts = [encode(tokenizer, _FACT.format(name=name, key=key)) for name, key in zip(names, keys)]
    stop = encode(tokenizer, ".\n")
    questions: list[int] = []
    answers = [(0, 0)] * count
    for i in rng.sample(range(count), count):
        prompt, answer = split_answer(tokenizer, _QUESTION.format(name=names[i]), f" {keys[i]}")
        questions += prompt
        answers[i] = (len(questions), len(questions) + len(answer))
        questions += answer + stop
    return _Quiz([], facts, questions, answers)


def _single_quiz(tokenizer: Any, count: int, rng: random.Random) -> _Quiz:
    key = _draw_key(rng)
    prompt, answer = split_answer(tokenizer, _SINGLE_QUESTION, f" {key}")
    return _Quiz(encode(tokenizer, INTRO), [encode(tokenizer, _SINGLE_FACT.format(key=key))],
                 prompt + answer, [(len(prompt), len(prompt) + len(answer))])


def _draw_key(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))
