"""Mean next-token loss on held-out text, in windows no longer than the native context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from extend.errors import DataError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.task import Cell, Prompt
from extend.evaluate.tasks.vocabulary import check_ids, shared_vocabulary
from extend.evaluate.tasks.windows import OfText
from extend.model_config import read_config


@dataclass(kw_only=True)
class Loss(OfText):
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

    window: int = 2048
    max_tokens: int = 65536

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        return [Cell(name, self.name, self.window, None, self.max_tokens // self.window)]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        if self.window - len(frame.prefix) < 2 or self.max_tokens < self.window:
            raise DataError(f"{cell.name}: a window of {self.window} tokens must hold at least 2 "
                            f"of text and fit into max_tokens, which is {self.max_tokens}")
        # The first token has nothing before it, so it is the prompt and the rest the answer.
        return [Prompt(ids, self.window - 1)
                for ids in self.cut(frame, self.window, cell.trials)]


@dataclass(kw_only=True)
class Divergence(Loss):
    """What a model has changed on short text: loss, KL and first choices beside a reference's.

    The reference is the model before its context was extended (or before a merge), the windows
    those of `loss`, no longer than its context. Where one of the two has tokens that the other
    lacks, both are taken over the tokens they share.

    Args:
        reference: checkpoint directory of the model to compare with.
        text: file or folder of text that neither model was trained on.
        window: tokens a window, the special tokens at its start included.
        max_tokens: score at most so many tokens.
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    measure: ClassVar[str] = "divergence"
    name: ClassVar[str] = "divergence"

    reference: str

    def inputs(self) -> dict[str, str]:
        return {**super().inputs(), "reference": self.reference}

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        native = read_config(self.reference).max_position_embeddings
        if self.window > native:
            raise DataError(f"{cell.name}: a window of {self.window} tokens is longer than the "
                            f"context of {self.reference}, {native}; ask for at most {native}")
        prompts = super().prompts(frame, cell, seed)
        shared = shared_vocabulary(frame.tokenizer, self.reference, cell.name)
        check_ids(prompts, shared, self.reference, cell.name)
        return prompts
