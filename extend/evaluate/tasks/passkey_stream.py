"""Passkey stream: one long row full of named keys, asked for at every length on its way."""

import bisect
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.named_facts import Fact, FactMaker
from extend.evaluate.tasks.needle import Text, check_leaks
from extend.evaluate.tasks.task import NO_NEEDLE, Cell, Prompt, derive, occurrences
from extend.haystack import INTRO, Haystack, Passage, hide

SINGLE = "single-needle"
NEAR = 0.005  # of a cell's prompt: an own fact so close to another's is not told, that one is asked


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked when `begin` tokens of a stream are read.

    Attributes:
        ids: question and answer; with the tokens before them they are `cell.length` tokens.
        details: as in `Prompt`.
    """

    cell: Cell
    begin: int
    ids: list[int]
    answer_len: int
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stream:
    """One row of the longest length without its questions, int32, and the questions, in order."""

    ids: np.ndarray
    questions: tuple[Question, ...]

    def prompt(self, question: Question) -> Prompt:
        """A question with all that precedes it: what one forward would read."""
        ids = np.concatenate([self.ids[:question.begin], np.asarray(question.ids, np.int32)])
        return Prompt(ids, question.answer_len, question.details)


@dataclass(frozen=True, slots=True)
class Slots:
    """Where facts go, in tokens after the head.

    Attributes:
        ends: for each length, ascending, where its questions begin.
        targets: where each fact is to begin.
        asked: (length, depth) -> index into `targets`.
    """

    ends: list[int]
    targets: list[int]
    asked: Mapping[tuple[int, float], int]


@dataclass(kw_only=True)
class PasskeyStream:
    """Find one of many named numbers, for all lengths and depths in one long row.

    The row is read once. At each length the facts are asked for that lie at the asked depths of
    what has been read; questions do not stay. Tokens before a question, the question and its
    answer together are exactly the asked length. A row holds dozens of facts of the same form, of
    which one is asked for: **harder than a single needle**, and not to be compared with
    `passkey`. Cells whose facts would begin within half a percent of each other's place share one,
    which `fact` in their trials shows. `trials` is the number of rows; each has facts and filler of
    its own.

    Args:
        controls: also ask at the shortest length with all facts left out: a score above 0 there
            means that the answer leaks.
        spot_checks: ask so many cells, spread over the grid, once more with all facts but theirs
            left out, each in a row of its own. None: no cell.
        haystack: hide the facts in this file or folder of text (see `Text`) instead of
            repeated filler sentences.
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    measure: ClassVar[str] = "stream"
    on_grid: ClassVar[bool] = True
    joined: ClassVar[bool] = True
    name: ClassVar[str] = "passkey-stream"

    controls: bool = True
    spot_checks: int | None = 3
    haystack: str | None = None
    column: str = "text"

    def __post_init__(self) -> None:
        self._text = None if self.haystack is None else Text(path=self.haystack, column=self.column)
        self._grid: tuple[tuple[int, ...], tuple[float, ...]] = ((), ())
        self._forget()

    def _forget(self) -> None:
        """Drop what was built for one cell and is kept for the next."""
        self._last: tuple[Any, Stream | None] = None, None
        self._plans: tuple[Any, dict[int, tuple[Slots, list[Fact]]]] = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items()
                if key not in ("_last", "_plans")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def chance(self) -> float:
        """The score of naming a fact in view at random, at the shortest length."""
        return 1 / max(1, len(self._grid[1]))

    def inputs(self) -> dict[str, str]:
        return {} if self.haystack is None else {"haystack": self.haystack}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        """The rows of the grid, which `prompts` and `stream` go by from then on."""
        self._grid = tuple(sorted(lengths)), tuple(sorted(depths))
        places = [(length, depth) for length in self._grid[0] for depth in self._grid[1]]
        grid = [Cell(name, self.name, *place, trials) for place in places]
        if self.controls:
            grid.append(Cell(name, self.name, self._grid[0][0], None, trials, NO_NEEDLE))
        return grid + [Cell(name, self.name, *place, trials, SINGLE)
                       for place in _spread(places, self.spot_checks or 0)]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        """As of any task; each prompt is what one forward would read for the same answer."""
        if cell.control == SINGLE:
            return [self._alone(frame, cell, seed, trial) for trial in range(cell.trials)]
        built = []
        for trial in range(cell.trials):
            stream = self._kept(frame, cell, seed, trial)
            built += [stream.prompt(question) for question in stream.questions
                      if (question.cell.length, question.cell.depth) == (cell.length, cell.depth)]
        return built

    def _kept(self, frame: Frame, cell: Cell, seed: int, trial: int) -> Stream:
        key = (frame, cell.name, cell.control, seed, trial, self._grid)
        if self._last[0] != key:
            self._last = key, self.stream(frame, cell, seed, trial)
        return self._last[1]

    def stream(self, frame: Frame, cell: Cell, seed: int, trial: int) -> Stream:
        """The row that holds a cell of the grid, or of the control, and all its questions.

        Raises:
            DataError: no room for the facts, too little text, or a prompt would leak its answer.
        """
        slots, facts = self._plan(frame, cell.name, seed, trial)
        if cell.control == NO_NEEDLE:
            return self._control(frame, cell, slots, facts, seed, trial)
        head = frame.open(INTRO)
        told = [[] for _ in slots.ends]
        for index in sorted(range(len(facts)), key=lambda i: (slots.targets[i], i)):
            told[bisect.bisect_right(slots.ends, slots.targets[index])].append(index)
        passages = self._passages(frame, cell, [
            end - begin - sum(len(facts[i].ids) for i in some)
            for (begin, end), some in zip(pairwise([0, *slots.ends]), told, strict=True)],
            derive(seed, self.name, trial, "passages"))
        parts, starts = [head], {}
        for begin, passage, some in zip([0, *slots.ends], passages, told, strict=False):
            depths = [_depth(slots.targets[i] - begin - before * len(facts[i].ids), passage)
                      for before, i in enumerate(some)]
            text, found = hide(passage, [facts[i].ids for i in some], depths)
            parts.append(text)
            starts |= {i: len(head) + begin + start for i, start in zip(some, found, strict=True)}
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        _check(cell, ids, facts, starts)
        return Stream(ids, self._questions(cell, slots, facts, starts, len(head)))

    def _questions(self, cell: Cell, slots: Slots, facts: Sequence[Fact],
                   starts: Mapping[int, int], head: int) -> tuple[Question, ...]:
        users = [list(slots.asked.values()).count(i) for i in range(len(facts))]
        questions = []
        for (length, depth), index in slots.asked.items():
            fact, begin = facts[index], length - facts[index].width[1]
            details = {
                "answer": f" {fact.key}", "fact": fact.name, "needle_position": starts[index],
                "actual_depth": (starts[index] - head) / max(1, begin - head - len(fact.ids)),
                "facts_in_view": sum(start < begin for start in starts.values()),
                "cells_of_fact": users[index]}
            questions.append(Question(
                Cell(cell.name, self.name, length, depth, cell.trials), begin,
                fact.question + fact.answer, len(fact.answer), details))
        return tuple(questions)

    def _control(self, frame: Frame, cell: Cell, slots: Slots, facts: Sequence[Fact], seed: int,
                 trial: int) -> Stream:
        """A row of the shortest length without a fact, and a question for each depth."""
        head = frame.open(INTRO)
        (passage,) = self._passages(frame, cell, [slots.ends[0]],
                                    derive(seed, self.name, trial, "control"))
        ids = np.asarray(head + passage.ids, dtype=np.int32)
        asked = dict.fromkeys(slots.asked[cell.length, depth] for depth in self._grid[1])
        _check(cell, ids, [facts[i] for i in asked], {})
        return Stream(ids, tuple(Question(cell, len(ids), facts[i].question + facts[i].answer,
                                          len(facts[i].answer), {"answer": f" {facts[i].key}",
                                                                 "fact": facts[i].name})
                                 for i in asked))

    def _alone(self, frame: Frame, cell: Cell, seed: int, trial: int) -> Prompt:
        """The fact of a cell, and no other, at the asked depth of a row of its own."""
        slots, facts = self._plan(frame, cell.name, seed, trial)
        fact = facts[slots.asked[cell.length, cell.depth]]
        head = frame.open(INTRO)
        room = cell.length - len(head) - sum(fact.width)
        (passage,) = self._passages(frame, cell, [room], derive(
            seed, self.name, trial, "alone", cell.length, f"{cell.depth:.6f}"))
        text, (start,) = hide(passage, [fact.ids], [cell.depth])
        ids = np.asarray(head + text + fact.question + fact.answer, dtype=np.int32)
        prompt = Prompt(ids, len(fact.answer), {
            "answer": f" {fact.key}", "fact": fact.name, "needle_position": len(head) + start,
            "actual_depth": start / max(1, room)})
        check_leaks(cell, prompt, [(len(head) + start, fact.ids)], [fact.answer])
        return prompt

    def _plan(self, frame: Frame, name: str, seed: int, trial: int) -> tuple[Slots, list[Fact]]:
        run = frame, name, seed, self._grid
        if self._plans[0] != run:
            self._plans = run, {}
        known = self._plans[1]
        if trial not in known:
            known[trial] = self._draw_plan(frame, name, seed, trial)
        return known[trial]

    def _draw_plan(self, frame: Frame, name: str, seed: int,
                   trial: int) -> tuple[Slots, list[Fact]]:
        lengths, depths = self._grid
        if not lengths:
            raise DataError(f"{name}: its facts depend on the whole grid; call cells() before a "
                            "prompt is built")
        head = len(frame.open(INTRO))
        rng = random.Random(derive(seed, self.name, trial, "facts"))
        maker = FactMaker(frame, len(lengths) * len(depths), rng, self._numbers())
        slots = plan_slots(lengths, depths, head, *maker.width, name)
        return slots, maker.make(len(slots.targets), name)

    def _passages(self, frame: Frame, cell: Cell, sizes: Sequence[int],
                  seed: int) -> list[Passage]:
        if min(sizes) < 0:
            raise DataError(
                f"{cell.name}: lengths {', '.join(map(str, self._grid[0]))} and "
                f"{len(self._grid[1])} depths put more facts between two lengths than there are "
                "tokens; ask for longer lengths, fewer of them or fewer depths")
        longest = max(self._grid[0])
        if self._text is None:  # a line for each passage may be left out
            haystack = Haystack.filler(frame.tokenizer, 2 * longest + 512 * len(sizes))
        else:
            haystack = self._text.haystack(frame.tokenizer, longest)
        return haystack.windows(sizes, random.Random(seed))

    def _numbers(self) -> Collection[str]:
        return () if self._text is None else self._text.numbers(5)


def plan_slots(lengths: Sequence[int], depths: Sequence[float], head: int, fact: int, asking: int,
               name: str) -> Slots:
    """Where the facts of a grid go.

    Args:
        head, fact, asking: tokens before the haystack, of a fact, and of question and answer.

    Raises:
        DataError: a length has no room for a fact.
    """
    ends = [length - asking - head for length in lengths]
    if ends[0] < fact:
        raise DataError(f"{name}: a length of {lengths[0]} leaves no room for a passage; "
                        f"instruction, fact, question and answer take {head + fact + asking} "
                        "tokens, so ask for more than that")
    targets: list[int] = []
    asked: dict[tuple[int, float], int] = {}
    for length, end in zip(lengths, ends, strict=True):
        for depth in depths:
            room = end - fact
            wanted = _whole(round(depth * room), ends, fact)
            near = min(range(len(targets)), key=lambda i: abs(targets[i] - wanted), default=None)
            if near is None or abs(targets[near] - wanted) > NEAR * room:
                near = len(targets)
                targets.append(wanted)
            asked[length, depth] = near
    return Slots(ends, targets, asked)


def _whole(target: int, ends: Sequence[int], fact: int) -> int:
    """The place nearest to `target` where a fact does not lie across the end of a length."""
    end = ends[bisect.bisect_right(ends, target)]
    if target + fact <= end:
        return target
    return end - fact if 2 * (end - target) >= fact else end


def _spread(places: Sequence[Any], count: int) -> list[Any]:
    """So many of the places, at equal distances."""
    count = min(count, len(places))
    return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]


def _depth(place: int, passage: Passage) -> float:
    return min(1.0, max(0.0, place / max(1, len(passage.ids))))


def _check(cell: Cell, ids: np.ndarray, facts: Sequence[Fact], starts: Mapping[int, int]) -> None:
    """Check that each fact that is told is there once, and its answer nowhere else.

    Raises:
        DataError: it is not.
    """
    for i, fact in enumerate(facts):
        told = [starts[i]] if i in starts else []
        found = occurrences(ids, fact.ids)
        stray = [place for place in occurrences(ids, fact.answer)
                 if not any(start <= place < start + len(fact.ids) for start in told)]
        if found != told or stray:
            raise DataError(f"{cell.name}: the fact of {fact.name!r} is at {found} instead of "
                            f"{told} of {len(ids)} tokens, and its answer also at {stray[:5]}; "
                            "this tokenizer cannot tell the pass keys from the text")
