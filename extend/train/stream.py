"""The endless stream of documents that rows are cut from.

Shapes: n documents. Nothing here depends on the rank or on what was read before: what a row holds
is a function of (seed, phase, index) and the documents.
"""

import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from extend.data_options import Upsampling
from extend.errors import DataError
from extend.train.token_cache import Documents

_GOLDEN = (math.sqrt(5) - 1) / 2


class Part(NamedTuple):
    """A piece of a document in a row: `count` of its tokens from `skip` on lie at `place`."""

    document: int
    skip: int
    place: int
    count: int


@dataclass(frozen=True)
class Stretch:
    """A piece of the stream.

    Attributes:
        ids: int64 [length].
        labels: which tokens may be predicted, bool [length].
        answers: bool [length], tokens of answers.
        bounds: int32, where documents begin, from 0, and `length` at the end.
    """

    ids: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    bounds: np.ndarray


class Passes:
    """All documents again and again, each time in a new seeded order.

    Args:
        sizes: int64 [n], tokens that each takes in a row.
        lengths: int64 [n], tokens of its text.
        upsample: which documents appear how often; None: each once a pass.
        source: for messages.

    Raises:
        DataError: no document is long enough for `upsample`.
    """

    def __init__(self, sizes: np.ndarray, lengths: np.ndarray, upsample: Upsampling | None,
                 seed: int, source: str):
        self.sizes, self.seed = sizes, seed
        self._upsample, self._orders = upsample, {}
        self._ends = [0]  # of the passes, in tokens
        if upsample is not None:
            self._long = np.flatnonzero(lengths >= upsample.min_length)
            self._shares = (np.arange(len(self._long)) * _GOLDEN) % 1.0
            if not len(self._long):
                raise DataError(f"{source}: upsample asks for documents of at least "
                                f"{upsample.min_length} tokens, but the longest has "
                                f"{int(lengths.max())}; lower min_length or leave upsample out")

    def copies(self, epoch: int) -> np.ndarray:
        """How often each document appears in a pass, int64 [n].

        After e passes a long document has appeared floor(e x factor) times or once more, and in
        every pass a fractional factor gives another, evenly spread part of them one copy more.
        """
        copies = np.ones(len(self.sizes), dtype=np.int64)
        if self._upsample is not None:
            done, now = (np.floor(passes * self._upsample.factor + self._shares)
                         for passes in (epoch, epoch + 1))
            copies[self._long] = (now - done).astype(np.int64)
        return copies

    def order(self, phase: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers in the order of a pass, and where each ends in it."""
        if (phase, epoch) not in self._orders:
            # An array, since a list of so many numbers would take five times the memory.
            order = array("q", np.repeat(np.arange(len(self.sizes)), self.copies(epoch)).tobytes())
            random.Random(f"{self.seed}/{phase}/{epoch}/order").shuffle(order)
            order = np.frombuffer(order, dtype=np.int64)
            if len(self._orders) > 1:  # neighbouring rows need two passes at most
                self._orders.clear()
            self._orders[phase, epoch] = (order, np.cumsum(self.sizes[order]))
        return self._orders[phase, epoch]

    def locate(self, position: int) -> tuple[int, int]:
        """The pass in which the token at `position` of the stream lies, and its place in it."""
        while self._ends[-1] <= position:
            passed = self.sizes @ self.copies(len(self._ends) - 1)
            self._ends.append(self._ends[-1] + int(passed))
        epoch = int(np.searchsorted(self._ends, position, side="right")) - 1
        return epoch, position - self._ends[epoch]


class PackedStream:
    """All documents one after the other; rows are cut from them wherever they end.

    Each document carries `prefix` (a BOS, or nothing) before and the end-of-sequence token after
    it. A document that is longer than what is left of a row goes on in the next.

    Args:
        document_length: documents that are longer are cut into pieces of so many tokens, which do
            not see one another; the last token of a piece predicts the first of the next.
        upsample: which documents appear how often.
    """

    def __init__(self, documents: Documents, *, prefix: Sequence[int], eos: int, seed: int,
                 document_length: int | None = None, upsample: Upsampling | None = None):
        self.documents, self.piece = documents, document_length
        self.prefix, self.eos = np.asarray(prefix, dtype=np.int64), eos
        lengths = np.diff(documents.offsets)
        self.sizes = lengths + len(prefix) + 1
        self._passes = Passes(self.sizes, lengths, upsample, seed, documents.source)

    @property
    def longest(self) -> int:
        """Tokens of the longest document that a row can hold."""
        return min(int(self.sizes.max()), self.piece or math.inf)

    def check(self, length: int) -> None:
        """Raise DataError when rows of `length` tokens cannot be cut from this stream."""
        if self.sizes.sum() < length:
            raise _too_few(self.documents.source, int(self.sizes.sum()), length)

    def parts(self, phase: int, index: int, length: int) -> Iterator[Part]:
        """What the `index`-th stretch of `length` tokens of this phase is made of."""
        epoch, position = self._passes.locate(index * length)
        filled = 0
        while filled < length:
            order, ends = self._passes.order(phase, epoch)
            first = int(np.searchsorted(ends, position, side="right"))
            for slot in range(first, len(order)):
                skip = position - (int(ends[slot - 1]) if slot else 0)
                count = min(int(ends[slot]) - position, length - filled)
                yield Part(int(order[slot]), skip, filled, count)
                filled, position = filled + count, int(ends[slot])
                if filled == length:
                    break
            epoch, position = epoch + 1, 0

    def bounds(self, phase: int, index: int, length: int) -> np.ndarray:
        """Where documents begin in a stretch, without reading it."""
        starts = {0: None}
        for part in self.parts(phase, index, length):
            step = self.piece or part.skip + part.count + 1
            first = -(-part.skip // step) * step - part.skip  # the next piece's first token
            starts |= dict.fromkeys(range(part.place + first, part.place + part.count, step))
        return np.asarray([*starts, length], dtype=np.int32)

    def cut(self, phase: int, index: int, length: int) -> Stretch:
        """The `index`-th stretch of `length` tokens of this phase."""
        ids, labels = np.empty(length, dtype=np.int64), np.ones(length, dtype=bool)
        for document, skip, place, count in self.parts(phase, index, length):
            ids[place:place + count] = self._read(document, skip, count)
            if skip == 0:
                labels[place] = False  # nothing before it says what a document begins with
        return Stretch(ids, labels, np.zeros(length, dtype=bool),
                       self.bounds(phase, index, length))

    def _read(self, document: int, skip: int, count: int) -> np.ndarray:
        """Some tokens of one document, of which only these are read."""
        low, high = (int(at) for at in self.documents.offsets[document:document + 2])
        begin = low + max(0, skip - len(self.prefix))
        end = min(high, low + skip + count - len(self.prefix))
        body = self.documents.ids[begin:max(begin, end)]
        return np.concatenate((self.prefix[skip:], body, [self.eos]))[:count]


class ExampleStream:
    """Examples one after the other, none of them cut: what is left of a row stays empty.

    An answer is learnt with its whole prompt before it, or it would teach to guess. Empty places
    hold the end-of-sequence token, are a document of their own, and are not predicted.
    """

    def __init__(self, documents: Documents, *, eos: int, seed: int):
        self.documents, self.eos = documents, eos
        self.sizes = np.diff(documents.offsets)
        self._passes = Passes(self.sizes, self.sizes, None, seed, documents.source)
        self._starts: dict[tuple[int, int], list[tuple[int, int]]] = {}

    @property
    def longest(self) -> int:
        return int(self.sizes.max())

    def check(self, length: int) -> None:
        """Raise DataError when rows of `length` tokens cannot be filled with these examples."""
        source, longest = self.documents.source, int(self.sizes.argmax())
        if self.sizes[longest] > length:
            raise DataError(f"{source}: example {longest + 1} has {int(self.sizes[longest])} "
                            f"tokens, more than a row of {length}; shorten it or give longer rows")
        if self.sizes.sum() < length:
            raise _too_few(source, int(self.sizes.sum()), length)

    def parts(self, phase: int, index: int, length: int) -> Iterator[Part]:
        """The examples of the `index`-th row of `length` tokens of this phase."""
        epoch, slot = self._start(phase, index, length)
        filled = 0
        while True:
            order, _ = self._passes.order(phase, epoch)
            for document in order[slot:]:
                size = int(self.sizes[document])
                if filled + size > length:
                    return
                yield Part(int(document), 0, filled, size)
                filled += size
            epoch, slot = epoch + 1, 0

    def _start(self, phase: int, index: int, length: int) -> tuple[int, int]:
        """Pass and place in it of a row's first example: rows before it decide, and are counted."""
        starts = self._starts.setdefault((phase, length), [(0, 0)])
        while len(starts) <= index:
            epoch, slot = starts[-1]
            order, ends = self._passes.order(phase, epoch)
            room = length
            while True:
                used = int(ends[slot - 1]) if slot else 0
                fits = int(np.searchsorted(ends, used + room, side="right"))
                if fits < len(order):
                    break
                room -= int(ends[-1]) - used
                epoch, slot = epoch + 1, 0
                order, ends = self._passes.order(phase, epoch)
            starts.append((epoch, fits))
        return starts[index]

    def bounds(self, phase: int, index: int, length: int) -> np.ndarray:
        """Where examples begin in a row, and where its empty places do."""
        parts = list(self.parts(phase, index, length))
        ends = {part.place + part.count: None for part in parts}
        return np.asarray([0, *(ends | {length: None})], dtype=np.int32)

    def cut(self, phase: int, index: int, length: int) -> Stretch:
        """The `index`-th row of `length` tokens of this phase."""
        ids = np.full(length, self.eos, dtype=np.int64)
        labels, answers = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
        for document, _, place, count in self.parts(phase, index, length):
            low = int(self.documents.offsets[document])
            ids[place:place + count] = self.documents.ids[low:low + count]
            answers[place + 1:place + count] = self.documents.answers[low + 1:low + count]
            labels[place + 1:place + count] = True
        return Stretch(ids, labels, answers, self.bounds(phase, index, length))


def _too_few(source: str, tokens: int, length: int) -> DataError:
    return DataError(f"{source}: has {tokens} tokens, too few for a row of {length}; give more "
                     "text or a shorter length")
