"""Text and examples as token ids, and the endless stream of documents that rows are cut from.

Shapes: n documents, t tokens of all documents. Nothing here depends on the rank: a stretch of the
stream is a function of (seed, phase, index) and the documents.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extend.documents import list_files, read_documents, read_json_lines
from extend.encoding import encode_documents, find_lines
from extend.errors import DataError
from extend.haystack import Haystack, encode, split_answer


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, one after the other, without special tokens.

    Attributes:
        ids: int32 [t].
        offsets: int64 [n + 1]; document i is ids[offsets[i]:offsets[i + 1]].
        answer_starts: int64 [n], where the answer begins inside its document; None for text.
        source: where they come from, for messages.
    """

    ids: np.ndarray
    offsets: np.ndarray
    answer_starts: np.ndarray | None
    source: str


def tokenize_text(tokenizer: Any, path: str, column: str) -> Documents:
    """Tokenise every document of a file or folder; each ends with one line break.

    Raises:
        DataError: no text, or a tokenizer that cannot encode in parallel.
    """
    ids = list(encode_documents(tokenizer, read_documents(path, column=column), path,
                                "training text"))
    return _documents(ids, [len(some) for some in ids], None, path)


def tokenize_examples(tokenizer: Any, path: str) -> Documents:
    """Tokenise the prompt and answer pairs of a JSON lines file or a folder of them.

    Raises:
        DataError: a line without the text of `prompt` or `answer`, or another kind of file.
    """
    ids, sizes, answer_starts = [], [], []
    for where, row in _example_lines(path):
        if not all(isinstance(row.get(key), str) for key in ("prompt", "answer")):
            raise DataError(f"{where}: an example needs the texts 'prompt' and 'answer'; it has "
                            f"{', '.join(map(str, row))}")
        prompt, answer = split_answer(tokenizer, row["prompt"], row["answer"])
        if not answer:
            raise DataError(f"{where}: the answer is empty")
        ids.append(np.asarray(prompt + answer, dtype=np.int32))
        sizes.append(len(prompt) + len(answer))
        # White space that begins an answer is the model's to write, so it is trained too.
        answer_starts.append(min(len(prompt), len(encode(tokenizer, row["prompt"]))))
    return _documents(ids, sizes, np.asarray(answer_starts, dtype=np.int64), path)


def _example_lines(path: str) -> Iterable[tuple[str, dict]]:
    for file in list_files(path):
        if file.suffix != ".jsonl":
            raise DataError(f"{file}: examples are read from .jsonl files only")
        yield from read_json_lines(Path(file))


def _documents(ids: list[np.ndarray], sizes: list[int], answer_starts: np.ndarray | None,
               source: str) -> Documents:
    if not sum(sizes):
        raise DataError(f"{source}: holds no text")
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return Documents(np.concatenate(ids), offsets, answer_starts, source)


def as_haystack(tokenizer: Any, documents: Documents) -> Haystack:
    """The documents as one haystack whose passages may be cut at every line."""
    return Haystack(documents.ids, find_lines(tokenizer, documents.ids), documents.source)


@dataclass(frozen=True)
class Stretch:
    """A piece of the stream.

    Attributes:
        ids: int64 [length].
        starts: indices in `ids` where a document begins.
        answers: bool [length], tokens of answers whose prompt is in the stretch too.
    """

    ids: np.ndarray
    starts: list[int]
    answers: np.ndarray


class PackedStream:
    """All documents one after the other, in a new seeded order each time they are used up.

    Each document carries `prefix` (a BOS, or nothing) before and the end-of-sequence token after
    it; the latter counts as part of an answer, so that a skill learns to stop.
    """

    def __init__(self, documents: Documents, *, prefix: Sequence[int], eos: int, seed: int):
        self.documents = documents
        self.prefix, self.eos, self.seed = np.asarray(prefix, dtype=np.int64), eos, seed
        self.sizes = np.diff(documents.offsets) + len(prefix) + 1
        self._orders: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of one pass over all documents."""
        return int(self.sizes.sum())

    def check(self, length: int) -> None:
        """Raise DataError when rows of `length` tokens cannot be cut from this stream."""
        source = self.documents.source
        if self.num_tokens < length:
            raise DataError(f"{source}: has {self.num_tokens} tokens, too few for a row of "
                            f"{length}; give more text or a shorter length")
        if self.documents.answer_starts is not None and self.sizes.max() > length:
            raise DataError(f"{source}: example {int(self.sizes.argmax()) + 1} has "
                            f"{int(self.sizes.max())} tokens, more than a row of {length}")

    def cut(self, phase: int, index: int, length: int) -> Stretch:
        """The `index`-th stretch of `length` tokens of this phase."""
        epoch, position = divmod(index * length, self.num_tokens)
        ids, answers = np.empty(length, dtype=np.int64), np.zeros(length, dtype=bool)
        starts, filled = [], 0
        while filled < length:
            order, ends = self._order(phase, epoch)
            first = int(np.searchsorted(ends, position, side="right"))
            for slot in range(first, len(order)):
                skip = position - (int(ends[slot - 1]) if slot else 0)
                if skip == 0:
                    starts.append(filled)
                filled += self._copy(int(order[slot]), skip, ids[filled:], answers[filled:])
                position = int(ends[slot])
                if filled == length:
                    break
            epoch, position = epoch + 1, 0
        return Stretch(ids, starts, answers)

    def _copy(self, document: int, skip: int, ids: np.ndarray, answers: np.ndarray) -> int:
        """Copy one document from its token `skip` on; return how many tokens fitted."""
        low, high = self.documents.offsets[document:document + 2]
        body = np.concatenate((self.prefix, self.documents.ids[low:high], [self.eos]))[skip:]
        count = min(len(body), len(ids))
        ids[:count] = body[:count]
        if self.documents.answer_starts is not None and skip == 0:
            answers[len(self.prefix) + int(self.documents.answer_starts[document]):count] = True
        return count

    def _order(self, phase: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers in the order of this pass, and where each ends in it."""
        if (phase, epoch) not in self._orders:
            order = list(range(len(self.sizes)))
            random.Random(f"{self.seed}/{phase}/{epoch}/order").shuffle(order)
            if len(self._orders) > 1:  # neighbouring rows need two passes at most
                self._orders.clear()
            self._orders[phase, epoch] = (np.asarray(order), np.cumsum(self.sizes[order]))
        return self._orders[phase, epoch]
