"""The words that RULER draws from."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random

from extend.errors import DataError

_LISTS = Path(__file__).parent / "wonderwords"


@cache
def read_words(kind: str) -> list[str]:
    """`nouns`, `adjectives` or `verbs`, in the order of wonderwords 3.0.1.

    They lie beside this file because another version of the package would change every prompt.
    """
    with (_LISTS / f"{kind}.txt").open(encoding="utf-8") as file:
        return [line.rstrip() for line in file]


class HyphenatedWords(Sequence[str]):
    """Every different `first-second`, sorted, without holding all of them.

    Words that share no first word sort like their first words, so that a word is found by its
    index alone. Where one first word begins another (`well` and `well-made`), their words mix, may
    be the same, and are held.
    """

    def __init__(self, firsts: Sequence[str], seconds: Sequence[str]):
        self._seconds = sorted(set(seconds))
        self._blocks: list[str | list[str]] = []
        families: list[list[str]] = []
        for first in sorted({f"{first}-" for first in firsts}):
            if families and first.startswith(families[-1][0]):
                families[-1].append(first)
            else:
                families.append([first])
        for family in families:
            self._blocks.append(family[0] if len(family) == 1 else sorted(
                {first + second for first in family for second in self._seconds}))
        sizes = (len(self._seconds if isinstance(block, str) else block) for block in self._blocks)
        self._starts = [0, *accumulate(sizes)]
        self.size = self._starts[-1]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.size:
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        block, inner = self._blocks[number], index - self._starts[number]
        return block + self._seconds[inner] if type(block) is str else block[inner]


@cache
def hyphenated_words() -> HyphenatedWords:
    """`adjective-noun`: six million names of needles."""
    return HyphenatedWords(read_words("adjectives"), read_words("nouns"))


@cache
def single_words(seed: int) -> list[str]:
    """Every different noun, adjective and verb, in an order of the seed's own."""
    words = sorted({*read_words("nouns"), *read_words("adjectives"), *read_words("verbs")})
    Random(seed).shuffle(words)
    return words


@cache
def more_words(file: str) -> list[str]:
    """The words of a JSON file: a list, or the values of an object, in their order.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from None
    words = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{file}: neither a list of words nor an object whose values are words")
    return words


# A long prompt takes a million draws: these give what Random and uuid give, in less time.

def draw_below(rng: Random, count: int) -> int:
    """As `rng.randrange(count)`.

    Source: CPython, Lib/random.py, Random._randbelow_with_getrandbits.
    """
    bits = count.bit_length()
    drawn = rng.getrandbits(bits)
    while drawn >= count:
        drawn = rng.getrandbits(bits)
    return drawn


def draw_number(rng: Random) -> str:
    """Seven digits, the first not 0; as `rng.randint(10**6, 10**7 - 1)`."""
    return str(1_000_000 + draw_below(rng, 9_000_000))


def draw_word(rng: Random) -> str:
    """An adjective and a noun with a hyphen; as `rng.choice(hyphenated_words())`."""
    words = hyphenated_words()
    return words[draw_below(rng, words.size)]


def draw_uuid(rng: Random) -> str:
    """A random UUID; as `uuid.UUID(int=rng.getrandbits(128), version=4)`."""
    text = f"{rng.getrandbits(128):032x}"
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"


DRAWS = {"numbers": draw_number, "words": draw_word, "uuids": draw_uuid}
