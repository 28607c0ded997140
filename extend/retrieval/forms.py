"""Many wordings of a fact and of the question for it, and many kinds of values.

But for the first none is that of a test: what is measured is whether a model finds facts, and not
whether it knows a form.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from extend.retrieval.names import NAMES


class Form(NamedTuple):
    """A fact with `{name}` and `{value}`, and the question whose next words are the value."""

    fact: str
    question: str


FORMS: tuple[Form, ...] = (
    Form("The pass key for {name} is {value}.",
         "What is the pass key for {name}? The pass key for {name} is"),
    Form("In the register {name} stands under {value}.",
         "Where does {name} stand in the register? Under"),
    Form("Note: {value} opens the {name} box.", "What opens the {name} box? It is opened by"),
    Form("The parcel for {name} carries the label {value}.",
         "Question: which label does the parcel for {name} carry?\nAnswer:"),
    Form("Whoever asks about {name} should be told {value}.",
         "What should be told to whoever asks about {name}? Tell them"),
    Form("{name}: {value}", "From the list above, the entry of {name}:"),
    Form("It was agreed that {name} would be known as {value}.",
         "As what would {name} be known? As"),
    Form("Of all tickets, {value} went to {name}.", "Which ticket went to {name}? Ticket"),
    Form("The {name} account is kept under {value}, and nowhere else.",
         "The {name} account is kept under"),
    Form("Keep in mind that {name} answers to {value}.", "{name} answers to"),
    Form("{value} is what they wrote on the door of the {name} room.",
         "What did they write on the door of the {name} room? They wrote"),
    Form("Set {name} to {value} before you start.",
         "To what must {name} be set before you start? To"),
)


def _digits(rng: random.Random) -> str:
    count = rng.randint(3, 9)
    return str(rng.randrange(10 ** (count - 1), 10 ** count))


def _hexadecimal(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789abcdef", k=rng.randint(6, 16)))


def _words(rng: random.Random) -> str:
    return "-".join(rng.sample(NAMES, rng.randint(1, 3)))


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 3)))
    return f"{letters}-{rng.randrange(10, 10000)}"


def _time(rng: random.Random) -> str:
    return f"{rng.randrange(24):02}:{rng.randrange(60):02}"


VALUES: tuple[Callable[[random.Random], str], ...] = (_digits, _digits, _hexadecimal, _words, _code,
                                                      _time)
