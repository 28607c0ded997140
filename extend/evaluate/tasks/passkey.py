"""Passkey: one number hidden in long text and asked for at its end."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.held_text import HeldText
from extend.evaluate.tasks.task import NO_NEEDLE, Cell, Prompt, derive, occurrences
from extend.haystack import INTRO, Haystack, hide

NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION, PREFILL = "What is the pass key?", " The pass key is"
_KEY_LOW, _KEY_COUNT = 10_000, 90_000  # five digits, none leading zero: the same width for all
_MAX_DRAWS = 1000


@dataclass(kw_only=True)
class Passkey:
    """Find a number of five digits in repeated filler sentences.

    Prompt and answer together have exactly the asked length in tokens. The key is drawn from
    (seed, task, length, depth, trial) alone.

    Args:
        controls: also ask, at the shortest length, with the fact left out of the prompts: a score
            above 0 there means that the answer leaks.

    Source: Mohtashami & Jaggi 2023, arXiv:2305.16300, section 4.2.
    """

    measure: ClassVar[str] = "exact"
    on_grid: ClassVar[bool] = True
    name: ClassVar[str] = "passkey"

    controls: bool = True

    def inputs(self) -> dict[str, str]:
        return {}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        grid = [Cell(name, self.name, length, depth, trials)
                for length in lengths for depth in depths]
        if self.controls:
            grid.append(Cell(name, self.name, min(lengths), None, trials, NO_NEEDLE))
        return grid

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        place = (self.name, cell.length, cell.control or f"{cell.depth:.6f}")
        forbidden, used = self._taken_keys(), set()
        built = []
        for trial in range(cell.trials):
            key = draw_key(seed, place, trial, forbidden, used)
            used.add(key)
            rng = random.Random(derive(seed, *place, trial, "passage"))
            built.append(self._prompt(frame, cell, key, rng))
        return built

    def _prompt(self, frame: Frame, cell: Cell, key: str, rng: random.Random) -> Prompt:
        head = [*frame.head, *frame.encode(INTRO)]
        needle = [] if cell.control == NO_NEEDLE else frame.encode(NEEDLE.format(key=key))
        question, answer = frame.ask(QUESTION, PREFILL, f" {key}")
        fixed = len(head) + len(needle) + len(question) + len(answer)
        if cell.length <= fixed:
            raise DataError(f"{cell.name}: a length of {cell.length} leaves no room for a passage; "
                            f"instruction, fact, question and answer take {fixed} tokens, so ask "
                            f"for more than that")
        passage = self._haystack(frame.tokenizer, cell.length).window(cell.length - fixed, rng)
        text, starts = hide(passage, [needle], [cell.depth]) if needle else (passage.ids, [])
        ids = head + text + question + answer
        details = {"answer": f" {key}"}
        if needle:
            details |= {"needle_position": len(head) + starts[0],
                        "actual_depth": starts[0] / len(passage.ids)}
        check_leaks(cell, ids, needle, answer, details.get("needle_position", 0))
        return Prompt(ids, len(answer), details)

    def _haystack(self, tokenizer: Any, length: int) -> Haystack:
        return Haystack.filler(tokenizer, length)

    def _taken_keys(self) -> Collection[str]:
        return ()


@dataclass(kw_only=True)
class PasskeyText(Passkey):
    """Find a number of five digits in real text. Harder than in filler, and closer to use.

    Args:
        haystack: file or folder of text (see `extend.documents`) that the model was not trained
            on; see `HeldText` for how much of it is used.
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    name: ClassVar[str] = "passkey-text"

    haystack: str
    column: str = "text"

    def __post_init__(self) -> None:
        self._text = HeldText(self.haystack, self.column)

    def inputs(self) -> dict[str, str]:
        return {"haystack": self.haystack}

    def _haystack(self, tokenizer: Any, length: int) -> Haystack:
        return self._text.haystack(tokenizer, length)

    def _taken_keys(self) -> Collection[str]:
        return self._text.numbers()


def draw_key(seed: int, place: tuple, trial: int, forbidden: Collection[str],
             used: Collection[str]) -> str:
    """A key of five digits that is neither in the text nor asked for elsewhere in the cell.

    Raises:
        DataError: the text holds nearly every number of five digits.
    """
    for draw in range(_MAX_DRAWS):
        key = str(_KEY_LOW + derive(seed, *place, trial, "key", draw) % _KEY_COUNT)
        if key not in forbidden and key not in used:
            return key
    raise DataError(f"{place[0]}: the text holds {len(forbidden)} of the {_KEY_COUNT} numbers of "
                    "five digits, so no pass key is safe; give text with fewer numbers")


def check_leaks(cell: Cell, ids: Sequence[int], needle: Sequence[int], answer: Sequence[int],
                start: int) -> None:
    """Check that a prompt has its exact length, its fact once, and its answer nowhere else.

    Raises:
        DataError: it has not.
    """
    if len(ids) != cell.length:
        raise DataError(f"{cell.name}: a prompt has {len(ids)} tokens instead of {cell.length}")
    if needle and occurrences(ids, needle) != [start]:
        raise DataError(f"{cell.name}: the fact is at {occurrences(ids, needle)} of a prompt of "
                        f"{cell.length} tokens instead of at {start} alone")
    prompt = ids[:len(ids) - len(answer)]
    end = start + len(needle)
    stray = [i for i in occurrences(prompt, answer) if not start <= i < end]
    if stray:
        raise DataError(f"{cell.name}: the tokens of the answer {list(answer)} also occur at "
                        f"{stray[:5]} of a prompt of {cell.length} tokens, outside the fact at "
                        f"{start} to {end}; this tokenizer cannot tell the pass key from the text")
