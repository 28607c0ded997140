"""Rows of exactly `length` tokens, in an order that every rank knows.

Row i of phase p is a function of (seed, p, i) and the data alone. So all ranks agree without a
message, and a run resumes exactly by remembering its step.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from extend.data_options import ExampleData, RetrievalData, TextData
from extend.errors import DataError
from extend.haystack import Haystack, prefix_ids
from extend.retrieval.rows import RetrievalRows
from extend.train.text import (
    Documents,
    PackedStream,
    as_haystack,
    tokenize_examples,
    tokenize_text,
)
from extend.train_options import TrainOptions

IGNORE = -100  # label of a token that is not predicted
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Row:
    """One row of training tokens.

    Attributes:
        input_ids: int64 [length].
        labels: int64 [length], not shifted: input_ids, or IGNORE where it is not predicted.
        answers: bool [length], tokens that recall a fact or answer an example.
        cu_seqlens: int32, where documents begin, from 0, and `length` at the end.
        source: path or kind of the data it was drawn from, for messages.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    cu_seqlens: np.ndarray
    source: str


@dataclass(frozen=True)
class PackedRows:
    """Rows cut from a stream of documents; `mask_prompt` leaves the loss on answers only."""

    stream: PackedStream
    mask_prompt: bool

    def check(self, length: int) -> None:
        self.stream.check(length)

    def row(self, phase: int, index: int, draw: int, length: int) -> Row:
        stretch = self.stream.cut(phase, draw, length)
        labels = stretch.ids.copy()
        labels[stretch.starts] = IGNORE  # nothing before it says what a document begins with
        if self.mask_prompt:
            labels[~stretch.answers] = IGNORE
        bounds = np.asarray([*{0: None, **dict.fromkeys(stretch.starts)}, length], dtype=np.int32)
        return Row(stretch.ids, labels, stretch.answers, bounds, self.stream.documents.source)


@dataclass(frozen=True)
class QuizRows:
    """Rows with hidden facts."""

    builder: RetrievalRows
    seed: int

    def check(self, length: int) -> None:
        self.builder.check(length)

    def row(self, phase: int, index: int, draw: int, length: int) -> Row:
        ids, answers = self.builder.build(length, random.Random(f"{self.seed}/{phase}/{index}"))
        return Row(ids, ids.copy(), answers, np.asarray([0, length], dtype=np.int32),
                   f"retrieval in {self.builder.haystack.source}")


class Rows:
    """All rows of a run.

    Args:
        sources: one per entry of `options.data`.
        options: gives the weights, the schedule and the seed.

    Raises:
        DataError: a source from which a row of some phase cannot be built.
    """

    def __init__(self, sources: list[PackedRows | QuizRows], options: TrainOptions):
        self.sources, self.seed, self.schedule = sources, options.seed, options.schedule
        weights = np.asarray([data.weight for data in options.data], dtype=np.float64)
        self._bounds = np.cumsum(weights / weights.sum())
        self._draws = [self._plan(number) for number in range(len(options.schedule))]
        for length in sorted({phase.length for phase in options.schedule}):
            for source in sources:
                source.check(length)

    def _plan(self, phase: int) -> tuple[np.ndarray, np.ndarray]:
        """For every row of a phase: its source, and how many rows that source gave before.

        The sequence frac(start + i * golden ratio) is spread more evenly than random numbers, so
        even a phase of a few rows has its sources in the proportion of their weights.
        """
        count = self.schedule[phase].num_steps * self.schedule[phase].batch_rows
        start = random.Random(f"{self.seed}/{phase}/sources").random()
        points = (start + np.arange(count) * _GOLDEN) % 1.0
        chosen = np.minimum(np.searchsorted(self._bounds, points, side="right"),
                            len(self.sources) - 1)
        draws = np.zeros(count, dtype=np.int64)
        for source in range(len(self.sources)):
            mine = chosen == source
            draws[mine] = np.arange(mine.sum())
        return chosen, draws

    def row(self, phase: int, index: int) -> Row:
        """Row `index` of phase number `phase`."""
        chosen, draws = self._draws[phase]
        source = self.sources[chosen[index]]
        length = self.schedule[phase].length
        row = source.row(phase, index, int(draws[index]), length)
        if len(row.input_ids) != length:
            raise DataError(f"{row.source}: row {index} of phase {phase + 1} has "
                            f"{len(row.input_ids)} tokens, not {length}")
        return row


def load_rows(options: TrainOptions, tokenizer: Any) -> Rows:
    """Read and tokenise all data of a run.

    Raises:
        DataError: missing, malformed or too little text, or a tokenizer without an EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{options.model}: the tokenizer has no end-of-sequence token to put "
                        "between documents")
    prefix, eos = prefix_ids(tokenizer), tokenizer.eos_token_id
    texts: dict[tuple[str, str], Documents] = {}

    def read_text(path: str, column: str) -> Documents:
        if (path, column) not in texts:  # tokenised once, whatever uses it
            texts[path, column] = tokenize_text(tokenizer, path, column)
        return texts[path, column]

    def packed(documents: Documents, mask_prompt: bool) -> PackedRows:
        stream = PackedStream(documents, prefix=prefix, eos=eos, seed=options.seed)
        return PackedRows(stream, mask_prompt)

    def haystack(data: RetrievalData) -> Haystack:
        if data.path is None:
            return Haystack.filler(tokenizer, options.schedule[-1].length)
        return as_haystack(tokenizer, read_text(data.path, data.column))

    def make(data: TextData | RetrievalData | ExampleData) -> PackedRows | QuizRows:
        if isinstance(data, TextData):
            return packed(read_text(data.path, data.column), mask_prompt=False)
        if isinstance(data, ExampleData):
            return packed(tokenize_examples(tokenizer, data.path), mask_prompt=data.mask_prompt)
        rows = RetrievalRows(tokenizer, haystack(data), prefix, data.facts, data.template)
        return QuizRows(rows, options.seed)

    return Rows([make(data) for data in options.data], options)
