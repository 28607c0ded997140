"""Hide facts in long text, in token ids: shared by training rows and evaluation prompts.

Everything is built from ids at an exact length; nothing is decoded and tokenised again, because
that changes ids and lengths. Facts are inserted where a line of the haystack begins.
"""

import bisect
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extend.errors import DataError

_BATCH_CHARS = 1 << 24  # text handed to the tokenizer's threads at once; bounds their memory
_SOME_CHARS = 1 << 20  # the same where a part of the text may be enough

# The passkey test of Mohtashami & Jaggi 2023, arXiv:2305.16300 (wording of its published script).
INTRO = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
         "it. I will quiz you about the important information there.\n")
FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
          "There and back again.\n")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` alone, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prefix_ids(tokenizer: Any) -> list[int]:
    """The special tokens (a BOS, or nothing) that this tokenizer puts before a text."""
    plain, full = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return full[:full.index(plain[0])] if full != plain else []


def split_answer(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokenise prompt and answer jointly and cut where they part.

    When a token spans the cut (some BPEs join the last space with the answer), the cut moves left
    to the last token both share, so the model is asked for exactly what it would write. When the
    answer begins with tokens of white space alone (BPEs that keep digits apart), they go to the
    prompt: they say nothing of the answer, and a model that would write ` the` there is not wrong.
    """
    alone, joint = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    last = len(joint) - 1
    cut = 0
    while cut < min(len(alone), last) and alone[cut] == joint[cut]:
        cut += 1
    while cut == len(alone) < last and not tokenizer.decode([joint[cut]]).strip():
        alone = joint[:cut + 1]
        cut += 1
    return joint[:cut], joint[cut:]


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of haystack.

    Attributes:
        ids: its token ids.
        boundaries: ascending indices into `ids` where something may be inserted: 0, every line
            start, and len(ids).
    """

    ids: list[int]
    boundaries: list[int]


class Haystack:
    """A long sequence of token ids that passages are cut from.

    Args:
        ids: the tokens, one document after the other.
        line_starts: ascending indices into `ids` where a line begins; may hold len(ids).
        source: what it was made of, for messages.
    """

    def __init__(self, ids: Sequence[int] | np.ndarray, line_starts: Sequence[int] | np.ndarray,
                 source: str):
        self.ids = np.asarray(ids, dtype=np.int32)
        self.line_starts = np.asarray(line_starts, dtype=np.int64)
        self.source = source

    @classmethod
    def filler(cls, tokenizer: Any, num_tokens: int) -> "Haystack":
        """Repeated sentences about grass, at least `num_tokens` long."""
        unit = encode(tokenizer, FILLER)
        count = num_tokens // len(unit) + 2
        return cls(np.tile(np.asarray(unit, dtype=np.int32), count),
                   np.arange(0, len(unit) * count + 1, len(unit)), "repeated filler")

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Iterable[str], source: str,
                   limit: int | None = None) -> "Haystack":
        """Real text. Documents are separated by a line break.

        Args:
            limit: tokens; no document is taken up when those before it have as many.

        Raises:
            DataError: no text, or a tokenizer that cannot say where a token begins.
        """
        taken, total = [], 0
        for ids in encode_documents(tokenizer, texts, source, "hiding facts in text",
                                    _BATCH_CHARS if limit is None else _SOME_CHARS):
            taken.append(ids)
            total += len(ids)
            if limit is not None and total >= limit:
                break
        if not total:
            raise DataError(f"{source}: holds no text")
        joined = np.concatenate(taken)
        return cls(joined, find_lines(tokenizer, joined), source)

    def window(self, num_tokens: int, rng: random.Random) -> Passage:
        """Cut a passage of exactly `num_tokens` that ends where a line ends.

        Raises:
            DataError: the haystack is shorter than that.
        """
        first = bisect.bisect_left(self.line_starts, num_tokens)
        if num_tokens > 0 and first >= len(self.line_starts):
            raise self._too_short(num_tokens)
        end = (int(self.line_starts[rng.randrange(first, len(self.line_starts))])
               if num_tokens else 0)
        return self._passage(end - num_tokens, end)

    def windows(self, sizes: Sequence[int], rng: random.Random) -> list[Passage]:
        """Cut passages of exactly these sizes that follow one another, each to the end of a line.

        Where a size ends within a line, the next passage begins so much later that it ends with
        one: at most a line of text is left out between two.

        Raises:
            DataError: the haystack is too short for all of them.
        """
        shortest = self._ends(0, sizes)
        if shortest is None:
            raise self._too_short(sum(sizes))
        spare = bisect.bisect_right(self.line_starts, len(self.ids) - shortest[-1])
        # A start whose lines do not leave room is not taken; the first one always leaves it.
        starts = (int(self.line_starts[rng.randrange(spare)]) for _ in range(8 if spare else 0))
        ends = next(filter(None, (self._ends(start, sizes) for start in starts)), shortest)
        return [self._passage(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def _ends(self, start: int, sizes: Sequence[int]) -> list[int] | None:
        """Where passages of these sizes end, the first of which begins at `start` or later."""
        ends = []
        for size in sizes:
            line = bisect.bisect_left(self.line_starts, start + size) if size else None
            if line is not None and line >= len(self.line_starts):
                return None
            start = start if line is None else int(self.line_starts[line])
            ends.append(start)
        return ends

    def _passage(self, begin: int, end: int) -> Passage:
        low = bisect.bisect_right(self.line_starts, begin)
        high = bisect.bisect_left(self.line_starts, end)
        inner = (self.line_starts[low:high] - begin).tolist()
        return Passage(self.ids[begin:end].tolist(), [0, *inner, end - begin])

    def _too_short(self, num_tokens: int) -> DataError:
        return DataError(f"{self.source}: has {len(self.ids)} tokens, too few for a passage of "
                         f"{num_tokens}; give more text or a shorter length")


def encode_documents(tokenizer: Any, texts: Iterable[str], source: str, purpose: str,
                     batch_chars: int = _BATCH_CHARS) -> Iterator[np.ndarray]:
    """Ids int32 [n] of each text, which ends with one line break, without special tokens.

    Args:
        purpose: what needs it, for the message.
        batch_chars: characters that are encoded at once.

    Raises:
        DataError: a tokenizer that cannot encode many texts at once.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{source}: {purpose} needs a fast tokenizer (tokenizer.json)")
    backend = tokenizer.backend_tokenizer
    for batch in _batches(texts, batch_chars):
        backend.no_truncation()  # as any call of the tokenizer does that does not ask for it
        backend.no_padding()
        lines = [text.rstrip() + "\n" for text in batch]
        for coded in backend.encode_batch_fast(lines, add_special_tokens=False):
            yield np.asarray(coded.ids, dtype=np.int32)


def _batches(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def find_lines(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """Ascending indices int64 where a line begins: after a token that ends with a line break."""
    used, places = np.unique(ids, return_inverse=True)
    texts = tokenizer.batch_decode([[int(i)] for i in used], clean_up_tokenization_spaces=False)
    ends_line = np.array([text.endswith("\n") for text in texts], dtype=bool)
    return np.flatnonzero(ends_line[places]) + 1


def _nearest(boundaries: Sequence[int], place: float) -> int:
    """The ascending boundary closest to `place`; the lower of two equally close."""
    above = bisect.bisect_left(boundaries, place)
    around = boundaries[max(0, above - 1):above + 1]
    return min(around, key=lambda boundary: abs(boundary - place))


def hide(passage: Passage, facts: Sequence[Sequence[int]],
         depths: Sequence[float]) -> tuple[list[int], list[int]]:
    """Insert each fact at the boundary nearest to its depth.

    Args:
        facts: token ids of each fact; they should end with a line break.
        depths: for each fact, 0 (start of the passage) to 1 (its end).

    Returns:
        The ids with the facts in place, and for each fact the index of its first token in them.
    """
    places = [_nearest(passage.boundaries, depth * len(passage.ids)) for depth in depths]
    order = sorted(range(len(facts)), key=lambda i: places[i])
    ids: list[int] = []
    starts, copied = [0] * len(facts), 0
    for i in order:
        ids += passage.ids[copied:places[i]]
        copied, starts[i] = places[i], len(ids)
        ids += facts[i]
    return ids + passage.ids[copied:], starts
