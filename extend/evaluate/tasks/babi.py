"""Reasoning over facts that lie far apart: persons who move, take and drop things, in long text."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from extend.errors import DataError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.needle import Text
from extend.evaluate.tasks.task import Cell, Prompt, derive
from extend.haystack import Haystack, hide
from extend.registry import suggest

PERSONS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
_YES_NO, _COUNTS = ("yes", "no"), ("none", "one", "two")

INTRO = ("Facts about some persons are hidden in the following text, in the order in which they "
         "happened. A person carries what they took until they drop it. I will ask you about the "
         "facts afterwards.\n")
_MAX_DRAWS = 20_000


@dataclass
class World:
    """Where everybody and everything is, and how it came to be so.

    Attributes:
        places: of persons who have been anywhere.
        carried: thing -> the person who has it.
        trails: thing -> the places it has been in, the last one last, without repetition.
        facts: sentences so far.
    """

    places: dict[str, str] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    trails: dict[str, list[str]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)

    def move(self, person: str, place: str) -> None:
        self.places[person] = place
        for thing, carrier in self.carried.items():
            if carrier == person:
                self._trail(thing, place)
        self.facts.append(f"{person} went to the {place}.")

    def take(self, person: str, thing: str) -> None:
        self.carried[thing] = person
        self._trail(thing, self.places[person])
        self.facts.append(f"{person} took the {thing}.")

    def drop(self, person: str, thing: str) -> None:
        del self.carried[thing]
        self.facts.append(f"{person} dropped the {thing}.")

    def _trail(self, thing: str, place: str) -> None:
        trail = self.trails.setdefault(thing, [])
        if trail[-1:] != [place]:
            trail.append(place)

    def step(self, rng: random.Random) -> None:
        """One event that is possible now."""
        person = rng.choice(PERSONS)
        here = self.places.get(person)
        kinds = ["move", "move"]
        held = [thing for thing, carrier in self.carried.items() if carrier == person]
        free = [thing for thing in THINGS if here and thing not in self.carried
                and self.trails.get(thing, [here])[-1] == here]
        kinds += ["take"] * 2 * bool(free) + ["drop"] * bool(held)
        kind = rng.choice(kinds)
        if kind == "move":
            self.move(person, rng.choice([place for place in PLACES if place != here]))
        elif kind == "take":
            self.take(person, rng.choice(free))
        else:
            self.drop(person, rng.choice(held))


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a world; `answer` is one of the kind's answers."""

    text: str
    prefill: str
    answer: str


def _ask_place(world: World, rng: random.Random) -> Asked | None:
    """One supporting fact: where a person went last."""
    if not world.places:
        return None
    person = rng.choice(sorted(world.places))
    return Asked(f"Where is {person}?", f" {person} is in the", world.places[person])


def _ask_thing(world: World, rng: random.Random) -> Asked | None:
    """Two: who has a thing, and where that person went."""
    things = sorted(world.carried)
    if not things:
        return None
    thing = rng.choice(things)
    return Asked(f"Where is the {thing}?", f" The {thing} is in the",
                 world.places[world.carried[thing]])


def _ask_before(world: World, rng: random.Random) -> Asked | None:
    """Three: where a thing is, how it came there, and where it was before that."""
    things = [thing for thing, trail in sorted(world.trails.items())
              if len(trail) > 1 and trail.count(trail[-1]) == 1]
    if not things:
        return None
    thing = rng.choice(things)
    before, here = world.trails[thing][-2:]
    return Asked(f"Where was the {thing} before the {here}?",
                 f" Before the {here}, the {thing} was in the", before)


def _ask_whether(world: World, rng: random.Random) -> Asked | None:
    """Yes or no: whether a person is somewhere."""
    if not world.places:
        return None
    person = rng.choice(sorted(world.places))
    wrong = rng.choice([place for place in PLACES if place != world.places[person]])
    place = rng.choice([world.places[person], wrong])
    answer = "yes" if place == world.places[person] else "no"
    return Asked(f"Is {person} in the {place}? Answer yes or no.", " Answer:", answer)


def _ask_count(world: World, rng: random.Random) -> Asked | None:
    """How many things a person carries."""
    if not world.places:
        return None
    person = rng.choice(sorted(world.places))
    carried = sum(carrier == person for carrier in world.carried.values())
    if carried >= len(_COUNTS):
        return None
    return Asked(f"How many things does {person} carry? Answer none, one or two.", " Answer:",
                 _COUNTS[carried])


# Kind of question -> how it is asked, its answers, and the number of facts in the text.
QUESTIONS: dict[str, tuple[Callable[[World, random.Random], Asked | None], Sequence[str], int]] = {
    "one-fact": (_ask_place, PLACES, 8), "two-facts": (_ask_thing, PLACES, 12),
    "three-facts": (_ask_before, PLACES, 16), "yes-no": (_ask_whether, _YES_NO, 8),
    "counting": (_ask_count, _COUNTS, 16)}


@dataclass(kw_only=True)
class Babi:
    """Answer a question in one word from facts that are hidden, in order, in long text.

    Prompt and answer together have exactly the asked length in tokens. Every answer of a kind is
    right equally often, so `chance` is what guessing scores. It is scored by teacher forcing,
    which costs no generation and gives what greedy generation would: an answer is one word that
    the beginning of the answer leaves no other wording for.

    Args:
        question: one-fact, two-facts, three-facts, yes-no or counting.
        haystack: file or folder of text (see `extend.documents`) to hide the facts in; sentences
            about grass without it.
        column: key of a JSON line, or column of a parquet file, that holds the text.

    Source: the questions follow Weston et al. 2015, arXiv:1502.05698, tasks 1, 2, 3, 6 and 7; facts
    in long text, Kuratov et al. 2024, arXiv:2406.10149. The words and the world are made here.
    """

    measure: ClassVar[str] = "exact"
    on_grid: ClassVar[bool] = True
    depths_matter: ClassVar[bool] = False
    name: ClassVar[str] = "babi"

    question: str = "two-facts"
    haystack: str | None = None
    column: str = "text"

    def __post_init__(self) -> None:
        if self.question not in QUESTIONS:
            raise RecipeError(f"babi: unknown question {self.question!r};"
                              f"{suggest(self.question, QUESTIONS)} choose one of "
                              f"{', '.join(QUESTIONS)}")
        self._held = None if self.haystack is None else Text(path=self.haystack,
                                                             column=self.column)

    @property
    def chance(self) -> float:
        """Score of a guess."""
        return 1 / len(QUESTIONS[self.question][1])

    def inputs(self) -> dict[str, str]:
        return {"haystack": self.haystack} if self.haystack else {}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        return [Cell(name, self.name, length, None, trials) for length in lengths]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        return [self._prompt(frame, cell, seed, trial) for trial in range(cell.trials)]

    def _prompt(self, frame: Frame, cell: Cell, seed: int, trial: int) -> Prompt:
        place = (self.name, self.question, cell.length, trial)
        rng = random.Random(derive(seed, *place))
        world, asked = draw_story(self.question, self._answer(cell, seed, trial), rng)
        head = [*frame.head, *frame.encode(INTRO)]
        facts = [frame.encode(f"{fact}\n") for fact in world.facts]
        question, answer = frame.ask(asked.text, asked.prefill, f" {asked.answer}")
        fixed = len(head) + sum(map(len, facts)) + len(question) + len(answer)
        if cell.length <= fixed:
            raise DataError(f"{cell.name}: a length of {cell.length} leaves no room for a passage; "
                            f"instruction, facts, question and answer take {fixed} tokens, so ask "
                            "for more than that")
        passage = self._text(frame.tokenizer, cell.length).window(cell.length - fixed, rng)
        # Sorted depths, and equal places keep their order: facts come as they happened.
        ids, starts = hide(passage, facts, sorted(rng.random() for _ in facts))
        return Prompt([*head, *ids, *question, *answer], len(answer), {
            "answer": f" {asked.answer}", "question": asked.text, "facts": world.facts,
            "needle_positions": [len(head) + start for start in starts]})

    def _answer(self, cell: Cell, seed: int, trial: int) -> str:
        """Each answer once before any comes again."""
        answers = list(QUESTIONS[self.question][1])
        turn, number = divmod(trial, len(answers))
        rng = random.Random(derive(seed, self.name, self.question, cell.length, "answers", turn))
        return rng.sample(answers, len(answers))[number]

    def _text(self, tokenizer: Any, length: int) -> Haystack:
        if self._held is None:
            return Haystack.filler(tokenizer, length)
        return self._held.haystack(tokenizer, length)


def draw_story(kind: str, answer: str, rng: random.Random) -> tuple[World, Asked]:
    """A world and a question with that answer."""
    ask, _, num_facts = QUESTIONS[kind]
    for _ in range(_MAX_DRAWS):
        world = World()
        for _ in range(num_facts):
            world.step(rng)
        asked = ask(world, rng)
        if asked is not None and asked.answer == answer:
            return world, asked
    raise AssertionError(f"no story of kind {kind} ends with {answer}")
