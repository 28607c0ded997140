"""Hide facts in long text, in token ids: shared by training rows and evaluation prompts.

Everything is built from ids at an exact length; nothing is decoded and tokenised again, because
that changes ids and lengths. Facts are inserted where a line or a sentence of the haystack begins.
"""

import bisect
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extend.errors import DataError

# The passkey test of Mohtashami & Jaggi 2023, arXiv:2305.16300 (wording of its published script).
INTRO = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
         "it. I will quiz you about the important information there.\n")
FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
          "There and back again.\n")
# The end of a sentence inside a line: not after an initial, a title or a number of a list.
_SENTENCE_END = re.compile(r"""(?<!\b[A-Z0-9])(?<!\b[DMS][rst])(?<!\bMrs)(?<!\bProf)"""
                           r"""[.!?]["'”’)\]]*(?=[ \t]+["'“‘(\[]*[A-Z])""")
_LINE_BREAK = re.compile("\n")
_LINE_START = re.compile(r"\n(?=\S)")
_PIECE_CHARS = 4000  # tokenised at once: a long text takes twice the time as a whole


def encode(tokenizer: Any, text: str, *, after_line: bool = False) -> list[int]:
    """Ids of `text`, without special tokens.

    Args:
        after_line: as it reads after a line break. SentencePiece tokenizers put a space before a
            text, which belongs there only at the very beginning.
    """
    if after_line and text:
        return encode_lines(tokenizer, [text])[0]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def encode_lines(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text as it reads after a line break."""
    if not texts:
        return []
    broken = encode(tokenizer, "\n")
    joint = tokenizer(["\n" + text for text in texts], add_special_tokens=False)["input_ids"]
    # A text that begins with a line break itself may share its first token with the other one.
    return [list(ids[len(broken):]) if ids[:len(broken)] == broken else encode(tokenizer, text)
            for ids, text in zip(joint, texts, strict=True)]


def prefix_ids(tokenizer: Any) -> list[int]:
    """The special tokens (a BOS, or nothing) that this tokenizer puts before a text."""
    plain, full = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return full[:full.index(plain[0])] if full != plain else []


def split_answer(tokenizer: Any, prompt: str, answer: str, *,
                 after_line: bool = False) -> tuple[list[int], list[int]]:
    """Tokenise prompt and answer jointly and cut where they part.

    When a token spans the cut (some BPEs join the last space with the answer), the cut moves left
    to the last token both share, so the model is asked for exactly what it would write. When the
    answer begins with tokens of white space alone (BPEs that keep digits apart), they go to the
    prompt: they say nothing of the answer, and a model that would write ` the` there is not wrong.
    """
    alone = encode(tokenizer, prompt, after_line=after_line)
    joint = encode(tokenizer, prompt + answer, after_line=after_line)
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
        boundaries: ascending indices into `ids` where something may be inserted: 0, every line or
            sentence start, and len(ids).
        inside: those of them that lie inside a line.
        line_break: ids that are put before what is inserted inside a line.
    """

    ids: list[int]
    boundaries: list[int]
    inside: frozenset[int] = frozenset()
    line_break: Sequence[int] = ()


class Haystack:
    """A long sequence of token ids that passages are cut from.

    Args:
        ids: the tokens, one document after the other.
        line_starts: ascending indices into `ids` where a line begins; may hold len(ids).
        source: what it was made of, for messages.
        sentence_starts: ascending indices where a sentence begins inside a line.
        line_break: ids of a line break; needed with sentence starts.
    """

    def __init__(self, ids: Sequence[int] | np.ndarray, line_starts: Sequence[int] | np.ndarray,
                 source: str, *, sentence_starts: Sequence[int] = (),
                 line_break: Sequence[int] = ()):
        self.ids = np.asarray(ids, dtype=np.int32)
        self.line_starts = np.asarray(line_starts, dtype=np.int64)
        self.inside = np.asarray(sentence_starts, dtype=np.int64)
        self.line_break, self.source = list(line_break), source
        self.boundaries = (np.union1d(self.line_starts, self.inside) if len(self.inside)
                           else self.line_starts)

    @classmethod
    def filler(cls, tokenizer: Any, num_tokens: int) -> "Haystack":
        """Repeated sentences about grass, at least `num_tokens` long."""
        unit = encode(tokenizer, FILLER, after_line=True)
        count = num_tokens // len(unit) + 2
        return cls(np.tile(np.asarray(unit, dtype=np.int32), count),
                   np.arange(0, len(unit) * count + 1, len(unit)), "repeated filler")

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Iterable[str], source: str,
                   limit: int | None = None) -> "Haystack":
        """Real text. Documents are separated by a line break.

        Args:
            limit: tokens; no more text is taken up than gives as many.

        Raises:
            DataError: no text, or a tokenizer that cannot say where a token begins.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"{source}: hiding facts in text needs a fast tokenizer "
                            "(tokenizer.json)")
        ids: list[int] = []
        lines: list[int] = []
        sentences: list[int] = []
        for piece in _pieces(tokenizer, texts):
            coded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True,
                              verbose=False)
            gaps = _Gaps(coded["offset_mapping"], len(ids))
            lines += gaps.find(match.end() for match in _LINE_BREAK.finditer(piece))
            sentences += gaps.find(match.end() for match in _SENTENCE_END.finditer(piece))
            ids += coded["input_ids"]
            if limit is not None and len(ids) >= limit:
                break
        if not ids:
            raise DataError(f"{source}: holds no text")
        return cls(ids, lines, source, sentence_starts=sentences,
                   line_break=encode(tokenizer, "\n", after_line=True))

    def window(self, num_tokens: int, rng: random.Random) -> Passage:
        """Cut a passage of exactly `num_tokens` that ends where a line or a sentence ends.

        Raises:
            DataError: the haystack is shorter than that.
        """
        if num_tokens <= 0:
            return Passage([], [0, 0])
        ends = self.boundaries if num_tokens > len(self.line_break) else self.line_starts
        first = bisect.bisect_left(ends, num_tokens)
        if first >= len(ends):
            raise self._too_short(num_tokens)
        end = int(ends[rng.randrange(first, len(ends))])
        closing = self.line_break if _holds(self.inside, end) else []
        begin = end - num_tokens + len(closing)
        inner = _between(self.boundaries, begin, end)
        inside = _between(self.inside, begin, end)
        return Passage([*self.ids[begin:end].tolist(), *closing],
                       [0, *(inner - begin).tolist(), num_tokens],
                       frozenset((inside - begin).tolist()), self.line_break)

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
        """From one line's end to another's; facts go to the starts of its lines alone."""
        inner = _between(self.line_starts, begin, end) - begin
        return Passage(self.ids[begin:end].tolist(), [0, *inner.tolist(), end - begin])

    def _too_short(self, num_tokens: int) -> DataError:
        return DataError(f"{self.source}: has {len(self.ids)} tokens, too few for a passage of "
                         f"{num_tokens}; give more text or a shorter length")


def _between(places: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Those of the ascending places that lie after `begin` and before `end`."""
    return places[bisect.bisect_right(places, begin):bisect.bisect_left(places, end)]


def _holds(places: np.ndarray, place: int) -> bool:
    index = bisect.bisect_left(places, place)
    return index < len(places) and int(places[index]) == place


def _pieces(tokenizer: Any, texts: Iterable[str]) -> Iterator[str]:
    """The texts, each with a line break at its end, cut before lines where no token is."""
    whole = encode(tokenizer, "There.\nHere")
    cut = encode(tokenizer, "There.\n") + encode(tokenizer, "Here")
    for text in texts:
        text, begin = text.rstrip() + "\n", 0
        while begin < len(text):
            match = _LINE_START.search(text, begin + _PIECE_CHARS) if whole == cut else None
            end = match.end() if match else len(text)
            yield text[begin:end]
            begin = end


class _Gaps:
    """Where a text may be parted without parting a token.

    Args:
        offsets: (begin, end) in characters of every token.
        shift: added to the indices that are found.
    """

    def __init__(self, offsets: Sequence[tuple[int, int]], shift: int):
        self.begins = [begin for begin, _ in offsets]
        self.ends = [end for _, end in offsets]
        self.shift = shift

    def find(self, places: Iterable[int]) -> list[int]:
        """For each character index, ascending, the first token after it; those that lie inside a
        token are left out."""
        found, low = [], 0
        for place in places:
            low = bisect.bisect_right(self.ends, place, low)
            if low and (low == len(self.ends) or self.begins[low] >= place):
                found.append(self.shift + low)
        return found


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
        The ids with the facts in place, as many as those of passage and facts together, and for
        each fact the index of its first token in them.
    """
    hidden, starts = insert(passage, facts, depths)
    return hidden.ids, starts


def insert(passage: Passage, facts: Sequence[Sequence[int]],
           depths: Sequence[float]) -> tuple[Passage, list[int]]:
    """The same as `hide`, giving a passage into which more may be inserted.

    A line break that a fact inside a line needs before it takes the place of the passage's first
    tokens.
    """
    spare = len(passage.line_break) * len(facts)
    usable = [0, *passage.boundaries[bisect.bisect_left(passage.boundaries, max(1, spare)):]]
    places = [_nearest(usable, depth * len(passage.ids)) for depth in depths]
    broken = sorted(set(places) & passage.inside)
    ids, starts, shifts = [], [0] * len(facts), []
    copied = dropped = len(passage.line_break) * len(broken)
    for i in sorted(range(len(facts)), key=lambda i: places[i]):
        if places[i] > copied:
            ids += passage.ids[copied:places[i]]
            copied = places[i]
        if broken and places[i] == broken[0]:
            ids += passage.line_break
            broken = broken[1:]
        starts[i] = len(ids)
        ids += facts[i]
        shifts.append((places[i], len(ids) - copied))
    ids += passage.ids[copied:]
    return Passage(ids, *_shifted(passage, dropped, shifts, starts, len(ids)),
                   passage.line_break), starts


def _shifted(passage: Passage, dropped: int, shifts: Sequence[tuple[int, int]],
             starts: Sequence[int], length: int) -> tuple[list[int], frozenset[int]]:
    """Boundaries, and those inside a line, after an insertion.

    Args:
        dropped: how many tokens went from the front.
        shifts: (place in the passage, how far what follows it has moved), ascending.
        starts: where the facts are now; a line begins there.
    """
    places = [place for place, _ in shifts]
    moved, inside = {0, length, *starts}, set()
    for boundary in passage.boundaries:
        if dropped <= boundary:
            last = bisect.bisect_right(places, boundary) - 1
            new = boundary + (shifts[last][1] if last >= 0 else -dropped)
            moved.add(new)
            if boundary in passage.inside and boundary not in places:
                inside.add(new)
    return sorted(moved), frozenset(inside)
