"""What RULER's tasks share: from a cell to prompts, and the grade of an answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.score import string_match_all
from extend.evaluate.tasks.ruler.fit import Draft, Room
from extend.evaluate.tasks.ruler.tokens import WholeText, choose_text
from extend.evaluate.tasks.task import Cell, Prompt


@dataclass(kw_only=True)
class Ruler:
    """A task of RULER, as NVIDIA's scripts write it for a seed and a tokenizer, byte for byte.

    A run's seed is the scripts' `random_seed`, a BOS and a chat template count as their
    `model_template_token`. Samples of a cell are drawn one after the other, so the first of many
    are the same as all of few. A sample is at most as long as its cell, often a little shorter.

    Source: Hsieh et al. 2024, arXiv:2404.06654; github.com/NVIDIA/RULER at c3f5e3b,
    scripts/data/synthetic and scripts/synthetic.yaml.
    """

    measure: ClassVar[str] = "generated"
    on_grid: ClassVar[bool] = True
    depths_matter: ClassVar[bool] = False
    chance: ClassVar[float] = 0.0
    name: ClassVar[str]
    new_tokens: ClassVar[int]

    def inputs(self) -> dict[str, str]:
        return {}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        return [Cell(name, self.name, length, None, trials) for length in lengths]

    def grade(self, text: str, prompt: Prompt) -> float:
        """Share of the references that the answer holds."""
        return string_match_all(text, prompt.details["references"])

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        try:
            return self._build(frame, cell, seed, choose_text)
        except _OtherTokensError:
            return self._build(frame, cell, seed, lambda tokenizer, _: WholeText(tokenizer))

    def drafts(self, make_room: Callable[[Draft], Room], length: int, seed: int,
               where: str) -> Iterator[Draft]:
        """Samples without end.

        Args:
            make_room: what a sample may take, once it is known how samples look.
            length: that of the cell; settings of a task depend on it.
            where: the cell's name, for messages.
        """
        raise NotImplementedError

    def _build(self, frame: Frame, cell: Cell, seed: int,
               choose: Callable[[Any, Sequence[str]], WholeText]) -> list[Prompt]:
        template = len(frame.head) + len(frame.tail)
        rooms: list[Room] = []

        def make_room(draft: Draft) -> Room:
            text = choose(frame.tokenizer, [*draft.parts, draft.prefix])
            rooms.append(Room(cell.length - template, self.new_tokens, text))
            return rooms[-1]

        drafts = self.drafts(make_room, cell.length, seed, cell.name)
        built = []
        for _ in range(cell.trials):
            draft = next(drafts)
            built.append(_prompt(frame, cell, draft, rooms[-1]))
        return built


class _OtherTokensError(Exception):
    """A text whose tokens are not those of its pieces."""


def _prompt(frame: Frame, cell: Cell, draft: Draft, room: Room) -> Prompt:
    parts = draft.parts if frame.chat else [*draft.parts, draft.prefix]
    ids = room.text.encode(parts)
    if not room.text.agrees(parts, ids):
        raise _OtherTokensError
    if frame.chat:
        ids += frame.ask("", draft.prefix)[0]
    prompt = Prompt([*frame.head, *ids], 0, {"references": draft.references}, room.new_tokens)
    if prompt.length > cell.length:
        raise DataError(f"{cell.name}: a prompt and its answer take {prompt.length} tokens instead "
                        f"of at most {cell.length}; ask for another length")
    return prompt
