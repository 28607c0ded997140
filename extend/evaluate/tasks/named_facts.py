"""Facts that each have a name and a key, all of the same width in tokens."""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.retrieval.names import NAMES

FACT = "The pass key for {name} is {key}.\n"
QUESTION, PREFILL = "What is the pass key for {name}?", " The pass key for {name} is"
_KEY_LOW, _KEY_COUNT = 10_000, 90_000  # five digits, none leading zero
_MAX_DRAWS = 16  # of keys for a name that may be too wide or narrow
_SAMPLE = 64  # names whose width is looked at
_MARGIN = 1.5  # the share in the sample may be larger than that in all names


@dataclass(frozen=True, slots=True)
class Fact:
    """A named key in token ids: what tells it, what asks for it, and the answer."""

    name: str
    key: str
    ids: list[int]
    question: list[int]
    answer: list[int]

    @classmethod
    def of(cls, frame: Frame, name: str, key: str) -> "Fact":
        question, answer = frame.ask(QUESTION.format(name=name), PREFILL.format(name=name),
                                     f" {key}")
        told = frame.encode(FACT.format(name=name, key=key), after_line=True)
        return cls(name, key, told, question, answer)

    @property
    def width(self) -> tuple[int, int]:
        """Tokens of the fact, and of question and answer together."""
        return len(self.ids), len(self.question) + len(self.answer)


class FactMaker:
    """Makes facts of one width, with names and keys that are all different.

    The width is the most frequent one of this tokenizer; names and keys of other widths are passed
    over. Names are single words if enough of them have that width, and two words otherwise.

    Args:
        most: how many facts will be made at most.
        forbidden: strings that must not be keys.

    Attributes:
        width: see `Fact.width`.
    """

    def __init__(self, frame: Frame, most: int, rng: random.Random, forbidden: Collection[str]):
        self._frame, self._rng, self._used = frame, rng, set(forbidden)
        names = rng.sample(NAMES, len(NAMES))
        self.width, share = self._common(names[:_SAMPLE])
        self._names: Iterable[str] = names
        if share * len(names) < _MARGIN * most:
            self._names = _pairs(rng)
            self.width, _ = self._common(self._names[:_SAMPLE])
        widths = {Fact.of(frame, NAMES[0], self._key()).width for _ in range(_MAX_DRAWS)}
        self._draws = 1 if len(widths) == 1 else _MAX_DRAWS  # where keys differ in width

    def make(self, count: int, source: str) -> list[Fact]:
        """So many facts; `source` is who asks, for messages.

        Raises:
            DataError: there are too few names or keys of one width.
        """
        facts = list(islice(filter(None, map(self._fact, self._names)), count))
        if len(facts) < count:
            raise DataError(f"{source}: only {len(facts)} of {count} facts have names and keys of "
                            "one width in this tokenizer that are not in the text; ask for fewer "
                            "lengths or depths, or give text with fewer numbers")
        return facts

    def _common(self, names: Sequence[str]) -> tuple[tuple[int, int], float]:
        """The most frequent width of facts with these names, and the share that has it."""
        widths = Counter(Fact.of(self._frame, name, self._key()).width for name in names)
        width, count = widths.most_common(1)[0]
        return width, count / len(names)

    def _fact(self, name: str) -> Fact | None:
        """A fact of the common width; None for a name that is wider or narrower."""
        for _ in range(self._draws):
            fact = Fact.of(self._frame, name, self._key())
            if fact.key not in self._used and fact.width == self.width:
                self._used.add(fact.key)
                return fact
        return None

    def _key(self) -> str:
        """A key that is still free, if there are some."""
        keys = (str(_KEY_LOW + self._rng.randrange(_KEY_COUNT)) for _ in range(1000))
        return next((key for key in keys if key not in self._used), str(_KEY_LOW))


def _pairs(rng: random.Random) -> list[str]:
    """Every two different words, in any order."""
    pairs = [f"{a} {b}" for a in NAMES for b in NAMES if a != b]
    return rng.sample(pairs, len(pairs))
