"""Exact match on pairs of prompt and answer from a file: a skill that can be scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from extend.documents import read_json_lines
from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.task import Cell, Prompt


@dataclass(kw_only=True)
class ExactMatch:
    """Answer every prompt of a file exactly.

    Args:
        file: JSON lines, each an object with the strings `prompt` and `answer`. The answer is
            what must follow the prompt, with its leading space and its end if they count.
        limit: use only the first so many lines.
    """

    measure: ClassVar[str] = "exact"
    on_grid: ClassVar[bool] = False
    name: ClassVar[str] = "exact-match"

    file: str
    limit: int | None = None

    def inputs(self) -> dict[str, str]:
        return {"file": self.file}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        return [Cell(name, self.name, None, None, len(self._rows()))]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        built = []
        for prompt, answer in self._rows():
            asked, wanted = frame.ask(prompt, "", answer)
            if not [*frame.head, *asked]:
                raise DataError(f"{self.file}: prompt {prompt!r} has no tokens to answer from")
            built.append(Prompt([*frame.head, *asked, *wanted], len(wanted), {"answer": answer}))
        return built

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        for where, row in read_json_lines(Path(self.file)):
            for key in ("prompt", "answer"):
                if not isinstance(row.get(key), str) or not row[key]:
                    raise DataError(f"{where}: {key!r} must be a text that is not empty, it is "
                                    f"{row.get(key)!r}")
            rows.append((row["prompt"], row["answer"]))
        if not rows:
            raise DataError(f"{self.file}: holds no lines")
        return rows[:self.limit]
