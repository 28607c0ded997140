"""Mean next-token loss on held-out text, in windows no longer than the native context."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from extend.documents import read_documents
from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.task import Cell, Prompt


@dataclass(kw_only=True)
class Loss:
    """Loss in nats a token over windows of text, each scored on its own.

    The documents are joined and cut into windows that do not overlap. When there is more text
    than `max_tokens`, windows at equal distances are used, so that every document has its share.

    Args:
        text: file or folder of text (see `extend.documents`) that the model was not trained on.
        window: tokens a window, the special tokens at its start included.
        max_tokens: score at most so many tokens.
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    measure: ClassVar[str] = "loss"
    on_grid: ClassVar[bool] = False
    name: ClassVar[str] = "loss"

    text: str
    window: int = 2048
    max_tokens: int = 65536
    column: str = "text"
    _ids: list[int] | None = field(default=None, init=False, repr=False)

    def inputs(self) -> dict[str, str]:
        return {"text": self.text}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        return [Cell(name, self.name, self.window, None, self.max_tokens // self.window)]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        prefix = list(frame.prefix)
        body = self.window - len(prefix)
        if body < 2 or self.max_tokens < self.window:
            raise DataError(f"{cell.name}: a window of {self.window} tokens must hold at least 2 "
                            f"of text and fit into max_tokens, which is {self.max_tokens}")
        ids = self._tokens(frame.tokenizer)
        total = len(ids) // body
        if not total:
            raise DataError(f"{self.text}: has {len(ids)} tokens, too few for one window of "
                            f"{self.window}; give more text or a shorter window")
        count = min(cell.trials, total)
        starts = [k * total // count * body for k in range(count)]
        # The first token has nothing before it, so it is the prompt and the rest the answer.
        return [Prompt(prefix + ids[s:s + body], self.window - 1) for s in starts]

    def _tokens(self, tokenizer: Any) -> list[int]:
        if self._ids is None:
            self._ids = []
            for text in read_documents(self.text, column=self.column):
                coded = tokenizer(text.rstrip() + "\n", add_special_tokens=False, verbose=False)
                self._ids += coded["input_ids"]
        return self._ids
