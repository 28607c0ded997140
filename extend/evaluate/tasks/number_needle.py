"""Number needle: the special magic number of a city, in filler or in text."""

import random
from dataclasses import dataclass, field
from typing import ClassVar

from extend.evaluate.tasks.needle import NeedleTask, Numbers, Quiz, Text, check_count

_INTRO = "This is a very long story book: <book>\n"
_FACT = "The special magic {city} number is: {number}.\n"
_CITIES = tuple("""
Accra Amsterdam Athens Auckland Baghdad Bangkok Barcelona Beijing Berlin Bogota Boston Brussels
Budapest Cairo Chicago Copenhagen Dakar Delhi Dublin Geneva Hamburg Hanoi Havana Helsinki Istanbul
Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Melbourne Milan Montreal Moscow Mumbai Nairobi
Oslo Paris Prague Quito Riga Rome Santiago Seoul Singapore Stockholm Sydney Taipei Tokyo Toronto
Tunis Vienna Warsaw Zurich""".split())  # noqa: SIM905


@dataclass(kw_only=True)
class TextTask(NeedleTask):
    """Facts in the user's text where it is given, in repeated filler where not.

    Args:
        haystack: file or folder of text (see `extend.documents`) that the model was not trained
            on; repeated filler without it.
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    haystack: str | None = None
    column: str = "text"
    _text: Text | None = field(default=None, init=False, repr=False)

    def text(self) -> Text | None:
        if self._text is None and self.haystack is not None:
            self._text = Text(path=self.haystack, column=self.column)
        return self._text


@dataclass(kw_only=True)
class NumberNeedle(TextTask):
    """Find the number of seven digits of one city.

    Args:
        distractors: so many other cities have numbers too.

    Source: the needle of EasyContext (jzhang38/EasyContext, eval_needle.py at 6b0d310), here with
    numbers of one width and an exact length.
    """

    name: ClassVar[str] = "number-needle"
    width: ClassVar[int] = 7
    chance: ClassVar[float] = 1 / 9_000_000

    distractors: int = 0

    def __post_init__(self) -> None:
        check_count(self.name, "distractors", self.distractors, 0, len(_CITIES) - 1)

    def quiz(self, rng: random.Random, numbers: Numbers) -> Quiz:
        city, *others = rng.sample(_CITIES, self.distractors + 1)
        number = numbers.draw(rng)
        return Quiz(
            intro=_INTRO, facts=[_FACT.format(city=city, number=number)], keys=[number],
            distractors=[_FACT.format(city=other, number=numbers.draw(rng)) for other in others],
            question=f"</book>\nBased on the content of the book, what is the special magic {city} "
                     "number?",
            prefill=f" The special magic {city} number is:", answer=f" {number}",
            in_view=1 + self.distractors)
