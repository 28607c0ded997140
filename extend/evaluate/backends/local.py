"""A transformers model in this process, on one device."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from extend.evaluate.backends.backend import AnswerScore, Generation
from extend.evaluate.cache import make_cache
from extend.evaluate.forward import (
    hidden_parts,
    refuse_growing_rope,
    row_states,
    score_after,
    score_answers,
    token_losses,
)
from extend.evaluate.generate import generate
from extend.evaluate.load import load_model
from extend.evaluate.tasks.task import Prompt
from extend.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import numpy as np


class LocalBackend:
    """A loaded model and its tokenizer.

    Args:
        chunk: most tokens in one forward; a longer row goes through a KV cache in parts.
    """

    name = "local"

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, chunk: int):
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        self._references: dict[Path, LocalBackend] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    def score(self, prompts: Sequence[Prompt]) -> list[AnswerScore]:
        return score_answers(self.model, prompts, chunk=self.chunk)

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        return generate(self.model, self.tokenizer, prompts, chunk=self.chunk)

    def token_losses(self, rows: Sequence[Sequence[int]],
                     last: Sequence[int] | None = None) -> "list[np.ndarray]":
        """Losses of tokens of each row; see `extend.evaluate.forward.token_losses`."""
        return token_losses(self.model, rows, chunk=self.chunk, last=last)

    def row_states(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, Tensor]]:
        """Last hidden states of rows; see `extend.evaluate.forward.row_states`."""
        return row_states(self.model, rows, chunk=self.chunk)

    def hidden_parts(self, ids: Sequence[int], cache: DynamicCache | None = None
                     ) -> Iterator[tuple[int, Tensor]]:
        """Read one row on top of a cache; see `extend.evaluate.forward.hidden_parts`."""
        return hidden_parts(self.model, ids, chunk=self.chunk, cache=cache)

    def new_cache(self, room: int) -> DynamicCache:
        """An empty cache, to read a row of at most `room` tokens into and ask questions after.

        Raises:
            CompatibilityError: the RoPE changes with the length.
        """
        refuse_growing_rope(self.model, "keys in a cache would not be those of a longer row; take "
                            "a task that reads a row for each question, such as passkey")
        return make_cache(self.model, room)

    def score_after(self, cache: DynamicCache, prompts: Sequence[Prompt]) -> list[AnswerScore]:
        """Score answers that each follow the row in a cache; see `extend.evaluate.forward`."""
        return score_after(self.model, cache, prompts, chunk=self.chunk)

    def reference(self, path: Path | str) -> "LocalBackend":
        """Another model on the same device and in the same dtype, loaded once and kept.

        Raises:
            CheckpointError: damaged weights, or names that do not fit the architecture.
        """
        path = Path(path).absolute()
        if path not in self._references:
            self._references[path] = LocalBackend(
                load_model(path, device=self.device, dtype=self.model.dtype),
                load_tokenizer(path), chunk=self.chunk)
        return self._references[path]
