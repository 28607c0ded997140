"""What tasks that hide facts share: their cells, their prompts, and checks that nothing leaks."""

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from extend.documents import read_documents
from extend.errors import DataError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.task import NO_CONTEXT, NO_NEEDLE, Cell, Prompt, derive, occurrences
from extend.haystack import Haystack, Passage, insert, split_answer

_MAX_DRAWS = 1000
_LEAST_TOKENS = 2**20  # shorter rows have this much text to draw passages from


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiz:
    """What is hidden and asked for in one prompt.

    Attributes:
        intro: begins the prompt; ends with a line break, like the facts.
        facts: what is asked for; left out of the control without needles.
        keys: what in the facts must be nowhere else.
        question, prefill: end the prompt; see `Frame.ask`.
        answer: what must follow, with its leading space; empty when the model writes it.
        distractors: facts of the same kind that are not asked for, at random depths.
        taken: what in the facts must not be in what they are hidden in, where that is written.
        in_view: how many things of the answer's kind the context holds: a model that picks one of
            them blindly is right once in so many times.
    """

    intro: str
    facts: Sequence[str]
    keys: Sequence[str]
    question: str
    prefill: str
    answer: str = ""
    distractors: Sequence[str] = ()
    taken: Sequence[str] = ()
    in_view: int | None = None


class PassageSource(Protocol):
    """Where passages are cut from: a Haystack, or something that writes them."""

    def window(self, num_tokens: int, rng: random.Random) -> Passage:
        """A passage of exactly so many tokens."""
        ...


class Numbers:
    """Draws numbers of one width, none with a leading zero, none twice, none of the text.

    Args:
        forbidden: numbers in the text.
        source: for messages.
    """

    def __init__(self, width: int, forbidden: Collection[str], source: str):
        self.low, self.high = 10 ** (width - 1), 10 ** width
        self.forbidden, self.source = forbidden, source
        self.used: set[str] = set()

    def draw(self, rng: random.Random) -> str:
        """
        Raises:
            DataError: the text holds nearly every number of this width.
        """
        for _ in range(_MAX_DRAWS):
            number = str(rng.randrange(self.low, self.high))
            if number not in self.forbidden and number not in self.used:
                self.used.add(number)
                return number
        raise DataError(f"{self.source}: {len(self.forbidden)} of the {self.high - self.low} "
                        f"numbers of {len(str(self.low))} digits are in the text and "
                        f"{len(self.used)} are in use, so no key is safe; give text with fewer "
                        "numbers")


@dataclass(kw_only=True)
class Text:
    """Text of the user that facts are hidden in; read and tokenised once.

    Of more text than is needed, what comes first is used: an eighth more than the row, or than 1M
    tokens for a shorter row.

    Args:
        path: file or folder (see `extend.documents`).
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    path: str
    column: str = "text"
    _texts: list[str] | None = field(default=None, init=False, repr=False)
    _tokens: dict[tuple[int, int], Haystack] = field(default_factory=dict, init=False, repr=False)
    _numbers: dict[int, frozenset[str]] = field(default_factory=dict, init=False, repr=False)

    def haystack(self, tokenizer: object, length: int) -> Haystack:
        """Enough of the text for rows of `length` tokens, if there is as much.

        Raises:
            DataError: no text, or a tokenizer without a tokenizer.json.
        """
        key = (id(tokenizer), max(length, _LEAST_TOKENS) * 9 // 8)
        if key not in self._tokens:
            self._tokens[key] = Haystack.from_texts(tokenizer, self._read(), self.path, key[1])
        return self._tokens[key]

    def __getstate__(self) -> dict[str, object]:
        """Without what is quickly made again, and would be another process's."""
        return {**self.__dict__, "_texts": None, "_tokens": {}}

    def numbers(self, width: int) -> frozenset[str]:
        """Every string of so many digits in the text: as a key it would be there twice."""
        if width not in self._numbers:
            runs = (run for text in self._read()
                    for run in re.findall(rf"[0-9]{{{width},}}", text))
            self._numbers[width] = frozenset(
                run[i:i + width] for run in runs for i in range(len(run) - width + 1))
        return self._numbers[width]

    def _read(self) -> list[str]:
        if self._texts is None:
            self._texts = list(read_documents(self.path, column=self.column))
        return self._texts


@dataclass(kw_only=True)
class NeedleTask:
    """Base of tasks that hide facts and ask for them. A member writes `quiz`.

    Prompt and answer together have exactly the asked length in tokens. Everything is drawn from
    (seed, task, length, depth, trial) alone.

    Attributes:
        width: digits of a key.
        chance: score of a model that guesses without having read anything.

    Args:
        controls: also ask, at the shortest length, with the facts left out of the prompts, and the
            question alone: a score above `chance` there means that the answer leaks.
    """

    measure: ClassVar[str] = "exact"
    on_grid: ClassVar[bool] = True
    depths_matter: ClassVar[bool] = True
    name: ClassVar[str]
    width: ClassVar[int] = 5
    chance: ClassVar[float] = 1 / 90_000

    controls: bool = True

    def text(self) -> Text | None:
        """The user's text, or None for repeated filler."""
        return None

    def quiz(self, rng: random.Random, numbers: Numbers) -> Quiz:
        """Draw what one prompt hides and asks for."""
        raise NotImplementedError

    def inputs(self) -> dict[str, str]:
        text = self.text()
        return {} if text is None else {"haystack": text.path}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        asked = depths if self.depths_matter else (None,)
        grid = [Cell(name, self.name, length, depth, trials)
                for length in lengths for depth in asked]
        left_out = (NO_NEEDLE, NO_CONTEXT) if self.controls else ()
        return grid + [Cell(name, self.name, min(lengths), None, trials, control)
                       for control in left_out]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        depth = "-" if cell.depth is None else f"{cell.depth:.6f}"
        left_out = cell.control if cell.control in (NO_NEEDLE, NO_CONTEXT) else depth
        text = self.text()
        numbers = Numbers(self.width, text.numbers(self.width) if text else (), cell.name)
        built = []
        for trial in range(cell.trials):
            rng = random.Random(derive(seed, self.name, cell.length, left_out, trial))
            quiz = self.quiz(rng, numbers)
            source = self.source(frame, cell.length, quiz)
            built.append(self._prompt(frame, cell, quiz, source, rng))
        return built

    def source(self, frame: Frame, length: int, quiz: Quiz) -> PassageSource:
        """What the facts of a quiz are hidden in."""
        text = self.text()
        return (Haystack.filler(frame.tokenizer, length) if text is None
                else text.haystack(frame.tokenizer, length))

    def budget(self, frame: Frame, quiz: Quiz) -> int:
        """Tokens that the model may write: twice what the answer takes, some to begin and end
        with, and its thinking; none where the answer is known."""
        if quiz.answer:
            return 0
        return 2 * len(frame.encode(", ".join(quiz.keys))) + 32 + frame.thinking

    def _prompt(self, frame: Frame, cell: Cell, quiz: Quiz, source: PassageSource,
                rng: random.Random) -> Prompt:
        budget = self.budget(frame, quiz)
        details = {"answer": quiz.answer} if quiz.answer else {"references": list(quiz.keys)}
        if cell.control == NO_CONTEXT:
            ids, answer = frame.ask_alone(quiz.question, quiz.prefill, quiz.answer)
            return Prompt(ids + answer, len(answer), details, budget)
        facts = [] if cell.control == NO_NEEDLE else quiz.facts
        head, (question, answer) = frame.open(quiz.intro), frame.ask(
            quiz.question, quiz.prefill, quiz.answer)
        coded = [frame.encode(fact, after_line=True) for fact in (*facts, *quiz.distractors)]
        fixed = sum(map(len, (head, *coded, question, answer))) + budget
        if cell.length <= fixed:
            raise DataError(f"{cell.name}: a length of {cell.length} leaves no room for a passage; "
                            f"instruction, facts, question and answer take {fixed} tokens, so ask "
                            f"for more than that")
        passage = source.window(cell.length - fixed, rng)
        passage, _ = insert(passage, coded[len(facts):], [rng.random() for _ in quiz.distractors])
        depths = [rng.random() if cell.depth is None else cell.depth for _ in facts]
        passage, starts = insert(passage, coded[:len(facts)], depths)
        ids = [*head, *passage.ids, *question, *answer]
        placed = [(len(head) + start, coded[i]) for i, start in enumerate(starts)]
        details |= _places(placed, len(head), len(passage.ids))
        prompt = Prompt(ids, len(answer), details | _view(quiz, source), budget)
        check_leaks(cell, prompt, placed, [_written(frame, cell, key) for key in quiz.keys])
        return prompt


def _written(frame: Frame, cell: Cell, key: str) -> list[int]:
    """Ids of a key as it reads after a word.

    Raises:
        DataError: they do not say the key.
    """
    ids = split_answer(frame.tokenizer, "is", f" {key}")[1]
    text = "".join(frame.tokenizer.decode(ids).split())
    if text != key:
        raise DataError(f"{cell.name}: this tokenizer cannot write the key {key!r}: it gives "
                        f"{text!r}")
    return ids


def _places(placed: Sequence[tuple[int, list[int]]], begin: int, size: int) -> dict[str, object]:
    """Where facts are in a passage of `size` tokens from `begin`; depth 1 is its end."""
    depths = [(start - begin) / max(1, size - len(fact)) for start, fact in placed]
    if len(placed) == 1:
        return {"needle_position": placed[0][0], "actual_depth": depths[0]}
    return {"needle_positions": [start for start, _ in placed], "actual_depths": depths}


def _view(quiz: Quiz, source: PassageSource) -> dict[str, int]:
    seen = quiz.in_view if quiz.in_view is not None else getattr(source, "written", None)
    return {} if seen is None else {"in_view": seen}


def check_leaks(cell: Cell, prompt: Prompt, placed: Sequence[tuple[int, Sequence[int]]],
                answers: Sequence[Sequence[int]]) -> None:
    """Check that a prompt has its exact length, each fact once, and its answers nowhere else.

    Args:
        placed: (index, ids) of every fact that is asked for.
        answers: ids of every key as it reads after a word.

    Raises:
        DataError: it has not.
    """
    if prompt.length != cell.length:
        raise DataError(f"{cell.name}: a prompt has {prompt.length} tokens instead of "
                        f"{cell.length}")
    asked = prompt.ids[:len(prompt.ids) - prompt.answer_len]
    for start, fact in placed:
        found = occurrences(asked, fact)
        if found != [start]:
            raise DataError(f"{cell.name}: a fact is at {found[:5]} of a prompt of {cell.length} "
                            f"tokens instead of at {start} alone")
    for answer in answers:
        stray = [i for i in occurrences(asked, answer)
                 if not any(start <= i < start + len(fact) for start, fact in placed)]
        if stray:
            raise DataError(f"{cell.name}: the tokens of the answer {list(answer)} also occur at "
                            f"{stray[:5]} of a prompt of {cell.length} tokens, outside the facts; "
                            "this tokenizer cannot tell the key from the text")


def check_count(task: str, option: str, value: int, low: int, high: int) -> None:
    """
    Raises:
        RecipeError: an option that is a count lies outside its limits.
    """
    if not low <= value <= high:
        raise RecipeError(f"{task}: {option}: {value} is not between {low} and {high}")
