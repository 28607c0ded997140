"""Losses on text as long as the context: by position, in sliding windows, on key tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from extend.errors import DataError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.task import Cell, Prompt
from extend.evaluate.tasks.vocabulary import check_ids, shared_vocabulary
from extend.evaluate.tasks.windows import OfText
from extend.model_config import read_config

SELF = "self"


@dataclass(kw_only=True)
class LossByPosition(OfText):
    """Loss at every position of long windows, in one pass: does it still fall, or does it rise?

    One row, at the longest of the asked lengths, holds the curve of all shorter ones. Its windows
    are the trials; with several, their differences give the standard errors.

    Args:
        text: file or folder of text that the model was not trained on.
        column: key of a JSON line, or column of a parquet file, that holds the text.
        join: false takes every window from one document that is long enough. Joined documents
            have nothing to say about one another, so a loss over them cannot fall for long.
        first: positions below this one are the first point of the curve.
        bins: points of the curve for each doubling of the position, with equally many tokens.
        native: tokens; the slope is fitted to positions from here on. By default the length that
            the RoPE in the model's config was made for, else its `max_position_embeddings`: give
            it for a model that was extended by its theta alone.
        short: tokens of windows in which every token is read once more, with between half of them
            and all of them before it. Slope and verdict are then those of the excess, the loss less
            that of the same token in its short window: text that gets harder along the row does
            not look like a model that loses its way.
    """

    measure: ClassVar[str] = "positions"
    on_grid: ClassVar[bool] = True
    depths_matter: ClassVar[bool] = False
    name: ClassVar[str] = "loss-by-position"

    join: bool = True
    first: int = 256
    bins: int = 4
    native: int | None = None
    short: int | None = None

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        return [Cell(name, self.name, max(lengths), None, trials)]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        _check_length(cell, len(frame.prefix) + 2, "a BOS and two tokens of text")
        if self.short is not None and not 2 * (len(frame.prefix) + 1) <= self.short < cell.length:
            raise DataError(f"{cell.name}: short is {self.short}, but windows have {cell.length} "
                            f"tokens; give less, and at least {2 * (len(frame.prefix) + 1)}")
        return [Prompt(ids, len(ids) - 1)
                for ids in self.cut(frame, cell.length, cell.trials, join=self.join)]


@dataclass(kw_only=True)
class SlidingPerplexity(OfText):
    """Perplexity of stretches of text read through a sliding window, for each length of it.

    The first window scores all its tokens, every later one only those that the window before it
    did not see. All lengths score the same tokens; the stretches are the trials.

    Args:
        text: file or folder of text that the model was not trained on.
        column: key of a JSON line, or column of a parquet file, that holds the text.
        join: false takes every stretch from one document that is long enough.
        stride: tokens that the window moves by.
        span: tokens of a stretch; by default as many as the longest window.

    Source: github.com/jquesnelle/yarn at 995db5b, eval/perplexity.py, which takes the mean over
    windows; here every token counts alike, and the row holds both.
    """

    measure: ClassVar[str] = "sliding"
    on_grid: ClassVar[bool] = True
    depths_matter: ClassVar[bool] = False
    name: ClassVar[str] = "sliding-perplexity"

    join: bool = True
    stride: int = 256
    span: int | None = None
    _longest: int = field(default=0, init=False, repr=False)

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        self._longest = max(lengths)
        return [Cell(name, self.name, length, None, trials) for length in lengths]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        """The stretches; windows are cut from them when they are scored."""
        span = self.span or max(self._longest, cell.length)
        if span < cell.length:
            raise DataError(f"{cell.name}: a window of {cell.length} tokens does not fit into a "
                            f"stretch of {span}; raise span")
        _check_length(cell, len(frame.prefix) + 2, "a BOS and two tokens of text")
        if self.stride > cell.length - len(frame.prefix):
            raise DataError(f"{cell.name}: a window of {cell.length} tokens that moves by "
                            f"{self.stride} leaves tokens out; lower stride")
        return [Prompt(ids, len(ids) - 1)
                for ids in self.cut(frame, span, cell.trials, join=self.join)]


@dataclass(kw_only=True)
class KeyTokens(OfText):
    """Loss on the tokens that take long context to predict, and its exponential (LongPPL).

    A token is a key when an evaluator loses more than `alpha` nats on it where it sees only
    `short` tokens before it, and itself loses less than `beta` with all of its context. Models
    are comparable where their evaluator is one and the same: their rows then have equal
    `key_sha256`.

    Args:
        text: file or folder of text that the model was not trained on.
        column: key of a JSON line, or column of a parquet file, that holds the text.
        join: false takes every window from one document that is long enough.
        evaluator: checkpoint directory with the model's tokens, such as the model before its
            context was extended; it reads at most its own context. `self` is the model.
        alpha: nats a key token must gain from long context.
        beta: nats that the evaluator may lose on it with long context.
        short: tokens of a short window; a token has between `short - stride` and `short` of them
            before it.
        stride: tokens that a short window moves by.

    Source: Fang et al. 2024, arXiv:2410.23771 (LSD and LCL choose, LongPPL scores), with its
    published alpha, beta, short window and stride.
    """

    measure: ClassVar[str] = "key-tokens"
    on_grid: ClassVar[bool] = True
    depths_matter: ClassVar[bool] = False
    name: ClassVar[str] = "key-tokens"

    join: bool = True
    evaluator: str = SELF
    alpha: float = 2.0
    beta: float = 2.0
    short: int = 4096
    stride: int = 1024

    def __post_init__(self) -> None:
        if self.stride >= self.short:
            raise RecipeError(f"key-tokens: stride {self.stride} must be less than short, which is "
                              f"{self.short}")

    def inputs(self) -> dict[str, str]:
        own = super().inputs()
        return own if self.evaluator == SELF else {**own, "evaluator": self.evaluator}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        return [Cell(name, self.name, length, None, trials) for length in lengths]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        context = self.evaluator_context(cell)
        if context <= self.short:
            raise DataError(f"{cell.name}: the evaluator's context of {context} tokens is no longer"
                            f" than short, {self.short}, so no token can gain from it; ask for "
                            "longer windows, lower short, or give an evaluator with more context")
        if self.stride > self.short - len(frame.prefix):
            raise DataError(f"{cell.name}: stride {self.stride} does not fit into short, "
                            f"{self.short}, beside {len(frame.prefix)} special tokens")
        prompts = [Prompt(ids, len(ids) - 1)
                   for ids in self.cut(frame, cell.length, cell.trials, join=self.join)]
        if self.evaluator != SELF:
            shared = shared_vocabulary(frame.tokenizer, self.evaluator, cell.name)
            check_ids(prompts, shared, self.evaluator, cell.name)
        return prompts

    def evaluator_context(self, cell: Cell) -> int:
        """Tokens that the evaluator sees at most where it has long context."""
        if self.evaluator == SELF:
            return cell.length
        return min(cell.length, read_config(self.evaluator).max_position_embeddings)


def _check_length(cell: Cell, least: int, what: str) -> None:
    if cell.length < least:
        raise DataError(f"{cell.name}: a length of {cell.length} does not hold {what}; ask for at "
                        f"least {least}")
