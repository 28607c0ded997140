"""RULER's variable tracking: which variables end up with a value."""

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, ClassVar

from extend.evaluate.tasks.ruler.fit import (
    Draft,
    Room,
    cut_parts,
    draw_fitting,
    largest_size,
    search_size,
)
from extend.evaluate.tasks.ruler.niah import NOISE
from extend.evaluate.tasks.ruler.task import Ruler

if TYPE_CHECKING:
    from numpy.random import RandomState

_INTRO = ("Memorize and track the chain(s) of variable assignment hidden in the following text."
          "\n\n")
_QUESTION = "Question: Find all variables that are assigned the value {value} in the text above."
_PREFIX = (" Answer: According to the chain(s) of variable assignment in the text above, 5 "
           "variables are assigned the value {value}, they are: ")
_NUM_NAMES = 5  # a first one, and four hops
_EXAMPLE_LENGTH, _EXAMPLE_STEP, _EXAMPLE_VALUE = 500, 5, "12345"


@dataclass(kw_only=True)
class VariableTracking(Ruler):
    """Name the five variables of a chain of assignments, after one example."""

    name: ClassVar[str] = "ruler-vt"
    new_tokens: ClassVar[int] = 30

    def drafts(self, make_room: Callable[[Draft], Room], length: int, seed: int,
               where: str) -> Iterator[Draft]:
        from numpy.random import RandomState

        rng, numbers = Random(seed), RandomState(seed)
        step = 10 if length >= 4096 else 5

        def draw(size: int) -> Draft:
            return _draw(rng, size, 5, str(numbers.randint(10000, 99999)))

        first = _draw_example(rng, _EXAMPLE_STEP)
        room = make_room(first)
        small = Room(_EXAMPLE_LENGTH - (length - room.length), 0, room.text)
        example = _fit_example(rng, small, first, where)

        def draw_with_example(size: int) -> Draft:
            draft = draw(size)
            shown = _rename(example, rng, numbers)
            return Draft(cut_parts([shown, "\n", *draft.parts]), draft.prefix, draft.references)

        size = search_size(draw, room, step, largest_size(room, draw(step), step),
                           room.text.count([example]))
        while True:
            yield draw_fitting(draw_with_example, room, size, step, where)


def _fit_example(rng: Random, room: Room, first: Draft, where: str) -> str:
    """An example of about 500 tokens with its answer."""
    def draw(size: int) -> Draft:
        return _draw_example(rng, size)

    size = search_size(draw, room, _EXAMPLE_STEP, largest_size(room, first, _EXAMPLE_STEP))
    draft = draw_fitting(draw, room, size, _EXAMPLE_STEP, where)
    return draft.text + draft.prefix + " " + " ".join(draft.references) + "\n"


def _draw_example(rng: Random, size: int) -> Draft:
    return _draw(rng, size, 3, _EXAMPLE_VALUE)


def _draw(rng: Random, size: int, letters: int, value: str) -> Draft:
    """So many lines of noise, with a chain of assignments in it."""
    names = _draw_names(rng, letters)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    lines = [NOISE] * size
    for i, place in enumerate(sorted(rng.sample(range(size), len(chain)))):
        lines.insert(place + i, chain[i])
    parts = [_INTRO, *(f"{line}\n" for line in lines), _QUESTION.format(value=value)]
    return Draft(cut_parts(parts), _PREFIX.format(value=value), names)


def _draw_names(rng: Random, letters: int) -> list[str]:
    """Five names. Where two are the same, which the published scripts trip over, more are drawn."""
    names = [_draw_name(rng, letters) for _ in range(_NUM_NAMES)]
    while len(set(names)) < _NUM_NAMES:
        names.append(_draw_name(rng, letters))
    return list(dict.fromkeys(names))


def _draw_name(rng: Random, letters: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=letters))


def _rename(example: str, rng: Random, numbers: "RandomState") -> str:
    """The example with other names and another value."""
    for name in example.split()[-_NUM_NAMES:]:
        example = example.replace(name, _draw_name(rng, len(name)))
    return example.replace(_EXAMPLE_VALUE, str(numbers.randint(10000, 99999)))
