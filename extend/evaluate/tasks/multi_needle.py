"""Several named pass keys in one context: one is asked for, some in order, or all of a name."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from extend.evaluate.tasks.needle import Numbers, Quiz, check_count
from extend.evaluate.tasks.number_needle import TextTask
from extend.evaluate.tasks.task import Prompt
from extend.retrieval.names import NAMES

_INTRO = ("There are several pass keys hidden inside a lot of irrelevant text. Find them and "
          "memorize them. I will quiz you about them.\n")
_FACT = "The pass key for {name} is {key}.\n"
_ONE_OF = "One of the pass keys for {name} is {key}.\n"


@dataclass(kw_only=True)
class MultiKey(TextTask):
    """Find the pass key of one name among those of others. The asked one lies at the depth, the
    others at random places.

    Args:
        keys: names with a pass key in the context.
    """

    name: ClassVar[str] = "multi-key"

    keys: int = 8

    def __post_init__(self) -> None:
        check_count(self.name, "keys", self.keys, 2, len(NAMES))

    def quiz(self, rng: random.Random, numbers: Numbers) -> Quiz:
        (name, *_), (fact, *others), (key, *_) = _draw(rng, numbers, self.keys)
        return Quiz(intro=_INTRO, facts=[fact], keys=[key], distractors=others,
                    question=f"What is the pass key for {name}?",
                    prefill=f" The pass key for {name} is", answer=f" {key}", in_view=self.keys)


@dataclass(kw_only=True)
class MultiQuery(TextTask):
    """Find the pass keys of several names, in the order in which they are asked for. Right only
    when all are.

    Args:
        queries: names that are asked for.
        keys: names with a pass key in the context, all at random places.
    """

    name: ClassVar[str] = "multi-query"
    depths_matter: ClassVar[bool] = False

    queries: int = 4
    keys: int = 8

    def __post_init__(self) -> None:
        check_count(self.name, "keys", self.keys, 2, len(NAMES))
        check_count(self.name, "queries", self.queries, 2, self.keys)

    @property
    def chance(self) -> float:
        return (1 / 90_000) ** self.queries

    def quiz(self, rng: random.Random, numbers: Numbers) -> Quiz:
        names, facts, keys = _draw(rng, numbers, self.keys)
        asked = _enumerate(names[:self.queries])
        return Quiz(intro=_INTRO, facts=facts[:self.queries], keys=keys[:self.queries],
                    distractors=facts[self.queries:],
                    question=f"What are the pass keys for {asked}, in this order?",
                    prefill=f" The pass keys for {asked} are",
                    answer=" " + ", ".join(keys[:self.queries]), in_view=self.keys)


@dataclass(kw_only=True)
class MultiValue(TextTask):
    """List all pass keys of one name, which has several, in any order.

    The model writes; its first numbers, as many as there are to find, are graded by the share that
    is right, so that listing everything gains nothing.

    Args:
        values: pass keys of the name that is asked for.
        distractors: pass keys of other names, all at random places.
    """

    name: ClassVar[str] = "multi-value"
    measure: ClassVar[str] = "generated"
    depths_matter: ClassVar[bool] = False

    values: int = 4
    distractors: int = 4

    def __post_init__(self) -> None:
        check_count(self.name, "values", self.values, 2, 100)
        check_count(self.name, "distractors", self.distractors, 0, len(NAMES) - 1)

    @property
    def chance(self) -> float:
        return self.values / 90_000  # of each number that is written

    def quiz(self, rng: random.Random, numbers: Numbers) -> Quiz:
        name, *others = rng.sample(NAMES, self.distractors + 1)
        keys = [numbers.draw(rng) for _ in range(self.values)]
        return Quiz(intro=_INTRO, facts=[_ONE_OF.format(name=name, key=key) for key in keys],
                    keys=keys, distractors=[_ONE_OF.format(name=other, key=numbers.draw(rng))
                                            for other in others],
                    question=f"What are all the pass keys for {name}? There are {self.values}.",
                    prefill=f" The pass keys for {name} are",
                    in_view=self.values + self.distractors)

    def grade(self, text: str, prompt: Prompt) -> float:
        """Share of the references among the first different numbers, as many as they are."""
        wanted = prompt.details["references"]
        written = list(dict.fromkeys(re.findall(r"[0-9]+", text)))[:len(wanted)]
        return len(set(written) & set(wanted)) / len(wanted)


def _draw(rng: random.Random, numbers: Numbers,
          count: int) -> tuple[list[str], list[str], list[str]]:
    """So many names, their facts and their keys."""
    names = rng.sample(NAMES, count)
    keys = [numbers.draw(rng) for _ in names]
    return names, [_FACT.format(name=name, key=key)
                   for name, key in zip(names, keys, strict=True)], keys


def _enumerate(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
