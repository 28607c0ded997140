"""What every evaluation task is made of: cells of a grid, and the prompts of a cell."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from extend.evaluate.frame import Frame

NO_NEEDLE = "no-needle"
NO_CONTEXT = "no-context"
BASE = "base"  # the prompts of the cell, put to the base model


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the results.

    Attributes:
        name: label of the task in this run; unique.
        task: its key in TASKS.
        length: tokens of prompt and answer together, or None when the rows have their own.
        depth: asked depth of the fact, 0 to 1, or None.
        trials: prompts in this cell (for tasks read from a file, at most).
        control: None, or what was left out of the prompts to see that nothing leaks.
    """

    name: str
    task: str
    length: int | None
    depth: float | None
    trials: int
    control: str | None = None

    @property
    def key(self) -> str:
        """Names the cell in the file of finished rows."""
        depth = "-" if self.depth is None else f"{self.depth:.6f}"
        return f"{self.name}|{self.length or '-'}|{depth}|{self.trials}|{self.control or '-'}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to score, or to go on from.

    Attributes:
        ids: the prompt, and the answer where it is known.
        answer_len: how many of the last ids are the answer; 0 where the model writes it.
        details: facts about this prompt for its entry in the results; JSON values. `references`
            are the texts that a written answer should hold.
        max_new_tokens: what the model may write at most; it is part of the prompt's length.
    """

    ids: list[int]
    answer_len: int
    details: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together, written or known."""
        return len(self.ids) + self.max_new_tokens


class Task(Protocol):
    """A member of TASKS. Its options are the keyword-only parameters of its constructor.

    Attributes:
        measure: how its prompts are scored; a key of `extend.evaluate.measures.MEASURES`.
        on_grid: whether it is asked at given lengths and depths.
        joined: whether all its cells are measured in one go; False where it is not there.
    """

    measure: ClassVar[str]
    on_grid: ClassVar[bool]

    def inputs(self) -> dict[str, str]:
        """Option -> path of every file or folder the task reads."""
        ...

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        """The rows this task will give."""
        ...

    def prompts(self, frame: "Frame", cell: Cell, seed: int) -> list[Prompt]:
        """Build the prompts of a cell; the same on every machine and in every order.

        Raises:
            DataError: the text is missing or too short, or a prompt would leak its answer.
        """
        ...


def derive(seed: int, *parts: object) -> int:
    """A 64-bit number that depends on nothing but its arguments."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def occurrences(ids: Sequence[int], pattern: Sequence[int]) -> list[int]:
    """Every index where `pattern` begins in `ids`."""
    ids, pattern, found, start = list(ids), list(pattern), [], 0
    while True:
        try:
            start = ids.index(pattern[0], start)
        except ValueError:
            return found
        if ids[start:start + len(pattern)] == pattern:
            found.append(start)
        start += 1
