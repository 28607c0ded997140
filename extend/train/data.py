"""Rows of exactly `length` tokens, in an order that every rank knows.

Row i of phase p is a function of (seed, p, i) and the data alone. So all ranks agree without a
message, and a run resumes exactly by remembering its step.
"""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from extend.data_options import (
    ExampleData,
    RetrievalData,
    TextData,
    source_weights,
)
from extend.errors import DataError
from extend.haystack import Haystack, prefix_ids
from extend.retrieval.rows import RetrievalRows
from extend.train.stream import ExampleStream, PackedStream, Stretch
from extend.train.text import TokenSource, as_haystack
from extend.train.token_cache import TokenCache
from extend.train_options import TrainOptions

IGNORE = -100  # label of a token that is not predicted
ROWS_FORMAT = 2  # how rows follow from seed and data; a run that began with another does not go on
_MOST_NAMED = 8  # documents
_GOLDEN = (math.sqrt(5) - 1) / 2


class RowKind(NamedTuple):
    """Rows of different kinds are never computed at once.

    Attributes:
        native_rope: read with the model's own RoPE, not that of the phase.
        distill: its loss is the divergence from the teacher, which reads it with its own RoPE.
        whole: the teacher reads it in windows, but the trained model reads all of it.
    """

    native_rope: bool = False
    distill: bool = False
    whole: bool = False

    @property
    def is_short(self) -> bool:
        """Whether no document is longer than the model's own RoPE is made for."""
        return self.native_rope or (self.distill and not self.whole)


PLAIN = RowKind()


class Windows(NamedTuple):
    """How the teacher reads a row that the trained model sees as one document.

    Attributes:
        input_ids: int64 [length], each window that begins inside a document with the prefix that
            documents have, a BOS if any, in the place of its first token.
        cu_seqlens: int32, where windows begin, from 0, and `length` at the end.
    """

    input_ids: np.ndarray
    cu_seqlens: np.ndarray


@dataclass(frozen=True)
class Row:
    """One row of training tokens.

    Attributes:
        input_ids: int64 [length].
        labels: int64 [length], not shifted: input_ids, or IGNORE where it is not predicted.
        answers: bool [length], tokens that recall a fact or answer an example; none of a row that
            is distilled.
        cu_seqlens: int32, where documents begin, from 0, and `length` at the end.
        source: path or kind of the data it was drawn from, for messages.
        positions: int64 [length], where they skip; none: its tokens follow one another.
        windows: of the teacher; none: it reads the row as the trained model does.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    cu_seqlens: np.ndarray
    source: str
    kind: RowKind = PLAIN
    positions: np.ndarray | None = None
    windows: Windows | None = None


@dataclass(frozen=True)
class DocumentRows:
    """Rows of documents or examples.

    Attributes:
        mask_prompt: leaves the loss on answers only.
        join: a row counts as one document.
    """

    stream: PackedStream | ExampleStream
    mask_prompt: bool
    kind: RowKind
    join: bool = False

    def check(self, length: int) -> None:
        self.stream.check(length)

    def check_native(self, native_len: int, teacher_len: int) -> None:
        """Raise DataError when documents are longer than the RoPE is made for that reads them."""
        for asks, key, whose, made_for in (
                (self.kind.native_rope, "rope: native", "the model's", native_len),
                (self.kind.distill, "distill", "the teacher's", teacher_len)):
            if asks and self.stream.longest > made_for:
                raise DataError(
                    f"{self.stream.documents.source}: {key} reads documents with {whose} "
                    f"own RoPE, which is made for {made_for} tokens, but the longest has "
                    f"{self.stream.longest}; set document_length to {made_for} at most, or leave "
                    f"{key.partition(':')[0]} out")

    def bounds(self, phase: int, draw: int, length: int) -> np.ndarray:
        return whole_row(length) if self.join else self.stream.bounds(phase, draw, length)

    def place(self, phase: int, draw: int, length: int) -> str:
        """Where a row comes from, for messages; documents are numbered from 1."""
        numbers = [part.document + 1 for part in self.stream.parts(phase, draw, length)]
        shown = ", ".join(map(str, numbers[:_MOST_NAMED]))
        more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
        return f"document {shown}{more} of {self.stream.documents.source}"

    def row(self, phase: int, index: int, draw: int, length: int) -> Row:
        stretch = self.stream.cut(phase, draw, length)
        predicted = stretch.labels & (stretch.answers | (not self.mask_prompt))
        labels = np.where(predicted, stretch.ids, IGNORE)
        bounds = whole_row(length) if self.join else stretch.bounds
        answers = stretch.answers & (not self.kind.distill)  # what they say is not learned there
        windows = None
        if self.kind.whole:
            labels, windows = cut_windows(stretch, self.stream.prefix)
        return Row(stretch.ids, labels, answers, bounds,
                   self.stream.documents.source, self.kind, windows=windows)


def cut_windows(stretch: Stretch, prefix: np.ndarray) -> tuple[np.ndarray, Windows]:
    """Labels int64 [length] of a row that a teacher reads in windows, and these windows.

    In a window that begins inside a document the teacher has seen less before each token than the
    trained model has: nothing, at first. So as many tokens are left out there as half of the row's
    longest window has.
    """
    ids, predicted = stretch.ids.copy(), stretch.labels.copy()
    half = int(np.diff(stretch.bounds).max()) // 2
    for begin, end in itertools.pairwise(stretch.bounds):
        if stretch.labels[begin]:  # of a document's first token there is none
            predicted[begin:min(begin + half, end)] = False
            ids[begin:begin + len(prefix)] = prefix[:end - begin]
    return np.where(predicted, stretch.ids, IGNORE), Windows(ids, stretch.bounds)


@dataclass(frozen=True)
class QuizRows:
    """Rows with hidden facts."""

    builder: RetrievalRows
    seed: int
    kind: RowKind = PLAIN

    def check(self, length: int) -> None:
        self.builder.check(length)

    def check_native(self, native_len: int, teacher_len: int) -> None:
        """They are never read with the model's own RoPE."""

    def bounds(self, phase: int, draw: int, length: int) -> np.ndarray:
        return whole_row(length)

    def place(self, phase: int, draw: int, length: int) -> str:
        return f"facts hidden in {self.builder.haystack.source}"

    def row(self, phase: int, index: int, draw: int, length: int) -> Row:
        ids, answers = self.builder.build(length, random.Random(f"{self.seed}/{phase}/{index}"))
        return Row(ids, ids.copy(), answers, self.bounds(phase, draw, length),
                   f"retrieval in {self.builder.haystack.source}")


def whole_row(length: int) -> np.ndarray:
    """The boundaries of a row that is one document, int32 [2]."""
    return np.asarray([0, length], dtype=np.int32)


class Rows:
    """All rows of a run.

    Args:
        sources: one per entry of `options.data`.
        options: gives the weights, the schedule and the seed.

    Raises:
        DataError: a source from which a row of some phase cannot be built.
    """

    def __init__(self, sources: list[DocumentRows | QuizRows], options: TrainOptions):
        self.sources, self.seed, self.schedule = sources, options.seed, options.schedule
        self._weights = [np.asarray(source_weights(options.data, phase.mix))
                         for phase in options.schedule]
        self._draws = [self._plan(number) for number in range(len(options.schedule))]
        for place, source in enumerate(sources):
            used = {phase.length for phase, weights in zip(self.schedule, self._weights,
                                                           strict=True) if weights[place]}
            for length in sorted(used):
                source.check(length)

    def _plan(self, phase: int) -> tuple[np.ndarray, np.ndarray]:
        """For every row of a phase: its source, and how many rows that source gave before.

        The sequence frac(start + i * golden ratio) is spread more evenly than random numbers, so
        even a phase of a few rows has its sources in the proportion of their weights.
        """
        count = self.schedule[phase].num_steps * self.schedule[phase].batch_rows
        used = np.flatnonzero(self._weights[phase])
        weights = self._weights[phase][used]
        start = random.Random(f"{self.seed}/{phase}/sources").random()
        points = (start + np.arange(count) * _GOLDEN) % 1.0
        places = np.searchsorted(np.cumsum(weights / weights.sum()), points, side="right")
        chosen = used[np.minimum(places, len(used) - 1)]
        draws = np.zeros(count, dtype=np.int64)
        for source in used:
            mine = chosen == source
            draws[mine] = np.arange(mine.sum())
        return chosen, draws

    def _source(self, phase: int, index: int) -> tuple[DocumentRows | QuizRows, int]:
        chosen, draws = self._draws[phase]
        return self.sources[chosen[index]], int(draws[index])

    def kind(self, phase: int, index: int) -> RowKind:
        """That of a row, which is not built for it."""
        return self._source(phase, index)[0].kind

    def documents(self, phase: int, index: int) -> list[int]:
        """Tokens of each document of a row, which is not built for it."""
        source, draw = self._source(phase, index)
        return np.diff(source.bounds(phase, draw, self.schedule[phase].length)).tolist()

    def place(self, phase: int, index: int) -> str:
        """The source of a row, and where in it the row lies, for messages."""
        source, draw = self._source(phase, index)
        return source.place(phase, draw, self.schedule[phase].length)

    def row(self, phase: int, index: int) -> Row:
        """Row `index` of phase number `phase`."""
        source, draw = self._source(phase, index)
        length = self.schedule[phase].length
        row = source.row(phase, index, draw, length)
        if len(row.input_ids) != length:
            raise DataError(f"{row.source}: row {index} of phase {phase + 1} has "
                            f"{len(row.input_ids)} tokens, not {length}")
        wide = self.schedule[phase]
        if wide.position_span is None or row.kind.is_short:
            return row
        rng = random.Random(f"{self.seed}/{phase}/{index}/positions")
        return replace(row, positions=skip_positions(
            length, wide.position_span, wide.position_pieces or 2, rng))


def skip_positions(length: int, span: int, pieces: int, rng: random.Random) -> np.ndarray:
    """Rising positions int64 [length] from 0 on, below `span`, that skip between `pieces`.

    Cuts are drawn evenly from all, and so are the shifts of the pieces after the first.

    Source: PoSE, arXiv:2309.10400, section 3.2, with two pieces; it keeps the first at 0 as well.
    """
    cuts = [0, *sorted(rng.sample(range(1, length), pieces - 1)), length]
    shifts = [0, *sorted(rng.randint(0, span - length) for _ in range(pieces - 1))]
    return np.arange(length) + np.repeat(shifts, np.diff(cuts))


def load_rows(options: TrainOptions, tokenizer: Any, cache: TokenCache | None = None,
              native_len: int | None = None, teacher_len: int | None = None) -> Rows:
    """Find all data of a run in the cache, and tokenise what is not there.

    Args:
        cache: none keeps nothing.
        native_len: tokens, the length of the model's own RoPE, if there is a model.
        teacher_len: that of the teacher's; the model's unless given.

    Raises:
        DataError: missing, malformed or too little text, or a tokenizer without an EOS token.
        CheckpointError: the cache cannot be written.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{options.model}: the tokenizer has no end-of-sequence token to put "
                        "between documents")
    tokens = TokenSource(tokenizer, cache or TokenCache())
    sources = [_MAKE[data.kind](data, tokens, options) for data in options.data]
    for source in sources:
        if native_len is not None:
            source.check_native(native_len, teacher_len or native_len)
    return Rows(sources, options)


def _text_rows(data: TextData, tokens: TokenSource, options: TrainOptions) -> DocumentRows:
    stream = PackedStream(
        tokens.text(data.path, data.column), prefix=prefix_ids(tokens.tokenizer),
        eos=tokens.tokenizer.eos_token_id, seed=options.seed,
        document_length=data.document_length, upsample=data.upsample)
    return DocumentRows(stream, mask_prompt=False, kind=_kind(data), join=data.join)


def _example_rows(data: ExampleData, tokens: TokenSource, options: TrainOptions) -> DocumentRows:
    stream = ExampleStream(tokens.examples(data.path), eos=tokens.tokenizer.eos_token_id,
                           seed=options.seed)
    return DocumentRows(stream, data.mask_prompt, _kind(data))


def _kind(data: TextData | ExampleData) -> RowKind:
    return RowKind(native_rope=data.rope == "native", distill=data.distill,
                   whole=data.distill and data.join)


def _quiz_rows(data: RetrievalData, tokens: TokenSource, options: TrainOptions) -> QuizRows:
    if data.path is None:
        haystack = Haystack.filler(tokens.tokenizer, options.schedule[-1].length)
    else:
        haystack = as_haystack(tokens.tokenizer, tokens.text(data.path, data.column))
    builder = RetrievalRows(tokens.tokenizer, haystack, prefix_ids(tokens.tokenizer), data.facts,
                            data.template)
    return QuizRows(builder, options.seed)


_MAKE: dict[str, Callable[[Any, TokenSource, TrainOptions], DocumentRows | QuizRows]] = {
    "text": _text_rows,
    "examples": _example_rows,
    "retrieval": _quiz_rows,
}
