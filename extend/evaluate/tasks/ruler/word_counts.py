"""RULER's aggregation tasks: the most common words of a list, and of a coded text."""

import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from extend.errors import DataError
from extend.evaluate.tasks.ruler.fit import Draft, Room, draw_fitting, search_size
from extend.evaluate.tasks.ruler.task import Ruler
from extend.evaluate.tasks.ruler.words import more_words, single_words

_NUM_COMMON = 10
_FIRST_SIZE = 4096  # words of the list that tells how many tokens a word takes
_SHOWN_PARTS = 4000  # numbers and words to see how the tokenizer cuts them
_CWE_INTRO = ("Below is a numbered list of words. In these words, some appear more often than "
              "others. Memorize the ones that appear most often.\n")
_CWE_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"


@dataclass(kw_only=True)
class CommonWords(Ruler):
    """Name the ten words that a numbered list repeats most, after one example.

    Args:
        words: a JSON file of words (a list, or an object with words as its values) for lists of
            more different words than wonderwords has; the published scripts take
            `english_words.json`.
    """

    name: ClassVar[str] = "ruler-cwe"
    new_tokens: ClassVar[int] = 120
    step: ClassVar[int] = 10

    words: str | None = None

    def inputs(self) -> dict[str, str]:
        return {"words": self.words} if self.words else {}

    def drafts(self, make_room: Callable[[Draft], Room], length: int, seed: int,
               where: str) -> Iterator[Draft]:
        rng = Random(seed)
        example, repeats = ((40, 10, 3), (30, 3)) if length >= 4096 else ((20, 3, 1), (6, 1))

        def draw(size: int) -> Draft:
            shown, common = self._list(rng, seed, where, *example)
            listed, references = self._list(rng, seed, where, size, *repeats)
            answer = [f" {i}. {word}" for i, word in enumerate(common, start=1)]
            parts = [_CWE_INTRO, *shown, _CWE_QUESTION, _CWE_PREFIX, *answer,
                     f"\n{_CWE_INTRO}", *listed, _CWE_QUESTION]
            return Draft(parts, _CWE_PREFIX, references)

        first = draw(_FIRST_SIZE)
        room = make_room(Draft(first.parts[:_SHOWN_PARTS], first.prefix, []))
        share = room.count(first) / _FIRST_SIZE
        size = search_size(draw, room, self.step, max(int(room.length // share) * 2, 20))
        while True:
            yield draw_fitting(draw, room, size, self.step, where)

    def _list(self, rng: Random, seed: int, where: str, num_words: int, often: int,
              seldom: int) -> tuple[list[str], list[str]]:
        """A numbered list, as parts, and the words that it repeats most."""
        drawn = rng.sample(self._choice(seed, num_words, where), num_words)
        spaced = [f" {word}" for word in drawn]
        words = spaced[:_NUM_COMMON] * often + spaced[_NUM_COMMON:] * seldom
        Random(seed).shuffle(words)
        parts = [""] * (2 * len(words))
        parts[::2] = ["1.", *(f" {i}." for i in range(2, len(words) + 1))]
        parts[1::2] = words
        return parts, drawn[:_NUM_COMMON]

    def _choice(self, seed: int, num_words: int, where: str) -> Sequence[str]:
        words = single_words(seed)
        if num_words <= len(words):
            return words
        if not self.words:
            raise DataError(f"{where}: a list of this length takes up to {num_words} different "
                            f"words, wonderwords has {len(words)}; give a file of more with the "
                            "option `words`, or ask for a shorter length")
        words = more_words(self.words)
        if num_words > len(words):
            raise DataError(f"{where}: a list of this length takes up to {num_words} different "
                            f"words, {self.words} has {len(words)}; give more words or ask for a "
                            "shorter length")
        return words


_FWE_INTRO = ("Read the following coded text and track the frequency of each coded word. Find the "
              "three most frequently appeared coded words. ")
_FWE_QUESTION = ("\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
                 "are the three most frequently appeared words in the above coded text?")
_FWE_PREFIX = (" Answer: According to the coded text above, the three most frequently appeared "
               "words are:")
_NOISE = "..."  # the word of the first rank
_LETTERS = 6  # of a coded word
_SHOWN_WORDS = 60  # coded words to see how the tokenizer cuts them
_ALPHA = 2.0  # of the zeta distribution of counts


@dataclass(kw_only=True)
class FrequentWords(Ruler):
    """Name the three most frequent of made-up words, whose counts fall with the square of the rank.
    """

    name: ClassVar[str] = "ruler-fwe"
    new_tokens: ClassVar[int] = 50

    def drafts(self, make_room: Callable[[Draft], Room], length: int, seed: int,
               where: str) -> Iterator[Draft]:
        rng = Random(seed)
        shown = _draw_vocabulary(Random(seed), seed, _SHOWN_WORDS)
        room = make_room(_coded_text(shown, _SHOWN_WORDS * 10, seed))
        most = room.length - room.new_tokens
        if most < 200:
            raise DataError(f"{where}: leaves {most} tokens to the text, at least 200 are needed; "
                            "ask for a greater length")
        vocabulary = _draw_vocabulary(rng, seed, most // 50)
        size = _search_words(vocabulary, room, most // _LETTERS, most // 32)
        while True:
            vocabulary = _draw_vocabulary(rng, seed, most // 50)
            fitting = _shrink_words(vocabulary, room, size, most // 32, where)
            yield _coded_text(vocabulary, fitting, seed)


def _draw_vocabulary(rng: Random, seed: int, size: int) -> list[str]:
    """Words by rank."""
    words = ["".join(rng.choices(string.ascii_lowercase, k=_LETTERS)) for _ in range(size)]
    while len(different := set(words)) < size:
        words.append("".join(rng.choices(string.ascii_lowercase, k=_LETTERS)))
    vocabulary = sorted(different)
    Random(seed).shuffle(vocabulary)
    return [_NOISE, *vocabulary[1:]]


def _count_words(vocabulary: Sequence[str], size: int) -> dict[str, int]:
    """How often each word is there in a text of about `size` words."""
    import numpy as np

    # The very operations of the published script, because a count may be cut just below a whole.
    ranks = np.arange(1, len(vocabulary) + 1)
    counts = (size * (ranks**-_ALPHA) / (math.pi**2 / 6)).astype(int)
    return dict(zip(vocabulary, counts.tolist(), strict=True))


def _coded_text(vocabulary: Sequence[str], size: int, seed: int) -> Draft:
    words = [word for word, n in _count_words(vocabulary, size).items() for _ in range(n)]
    Random(seed).shuffle(words)
    parts = [_FWE_INTRO.rstrip(), *(f" {word}" for word in words), _FWE_QUESTION]
    return Draft(parts, _FWE_PREFIX, list(vocabulary[1:4]))


def _num_tokens(vocabulary: Sequence[str], room: Room, size: int) -> int:
    """Tokens of a coded text of that size with its question, whatever the order of its words."""
    fixed = room.text.count([_FWE_INTRO.rstrip(), _FWE_QUESTION, _FWE_PREFIX])
    return fixed + room.text.count_all({f" {word}": n for word, n in
                                        _count_words(vocabulary, size).items() if n})


def _search_words(vocabulary: Sequence[str], room: Room, size: int, step: int) -> int:
    """The last size, from the first in steps, before a text takes all the room there is."""
    most = room.length - room.new_tokens
    while _num_tokens(vocabulary, room, size) < most:
        size += step
    return size - step


def _shrink_words(vocabulary: Sequence[str], room: Room, size: int, step: int, where: str) -> int:
    """The largest size, down from the given one in steps, that fits."""
    most = room.length - room.new_tokens
    for smaller in range(size, 0, -step):
        if _num_tokens(vocabulary, room, smaller) <= most:
            return smaller
    raise DataError(f"{where}: no coded text with its question fits into {most} tokens; ask for a "
                    "greater length")
