"""Count and encode long text that is made of few different pieces.

RULER fits a text to a length by trying sizes. Tokenising each try whole takes minutes at a million
tokens. Nearly all tokenizers first cut text at words and digits and never join what they cut, so
the tokens of a text are those of its pieces, and the same pieces come again and again. Whether
this holds, and where it cuts, is found out for each tokenizer by tokenising text both ways.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from operator import mul
from typing import Any

_MAX_KNOWN = 500_000  # parts whose number of tokens is remembered
_CHECKED_CHARS = 100_000  # at either end of a text

# A piece: white space, then a sign and the letters after it, or digits, or signs and the line
# breaks after them; the word after an empty line is read by some tokenizers to see how to cut the
# line breaks. Digits are cut after one, after three, or not at all.
_PIECES = [re.compile(r"\s*[^\w\s]?[^\W\d_]+|\s*\d" + digits +
                      r"|\s*(?:[^\w\s]|_)+(?:\n{2,}[^\W\d_]+|\n*)|\s+")
           for digits in ("", "{1,3}", "+")]
# Stands before a piece where a tokenizer would put a space of its own before a text.
_ANCHORS = ("", "\n")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` alone, however long it is."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class WholeText:
    """Tokens of texts that are tokenised from end to end: right for every tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(self, parts: Iterable[str]) -> list[int]:
        """Ids of the text that the parts make, without special tokens."""
        return encode(self.tokenizer, "".join(parts))

    def count(self, parts: Iterable[str]) -> int:
        """How many ids `encode` gives."""
        return len(self.encode(parts))

    def count_all(self, counts: Mapping[str, int]) -> int:
        """The same for parts that are there so many times, whatever their order."""
        return self.count(part for part, n in counts.items() for _ in range(n))

    def agrees(self, parts: Sequence[str], ids: Sequence[int]) -> bool:
        """Whether `ids` are those of the text: they are."""
        return True


class PiecedText(WholeText):
    """Tokens of texts that are put together from those of their pieces.

    Args:
        pieces: finds the pieces of a text.
        anchor: text before which nothing is joined with a piece.
    """

    def __init__(self, tokenizer: Any, pieces: re.Pattern[str], anchor: str):
        super().__init__(tokenizer)
        self._pieces, self._anchor = pieces, anchor
        self._anchor_ids = encode(tokenizer, anchor) if anchor else []
        self._ids: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}
        self._known: dict[str, int] = {}
        self._sound = True

    def encode(self, parts: Iterable[str]) -> list[int]:
        pieces = self._pieces.findall("".join(parts))
        if not pieces:
            return []
        self._learn(pieces)
        return encode(self.tokenizer, pieces[0]) + list(
            chain.from_iterable(map(self._ids.__getitem__, pieces[1:])))

    def count(self, parts: Iterable[str]) -> int:
        return self.count_all(Counter(parts))

    def count_all(self, counts: Mapping[str, int]) -> int:
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
        new = [part for part in counts if part not in self._known]
        missing = self._count_new(new)
        self._learn(chain.from_iterable(map(self._pieces.findall, missing)))
        self._count_new(missing)
        total = sum(map(mul, map(self._known.__getitem__, counts), counts.values()))
        return total + self._lead(next(iter(counts), ""))

    def _count_new(self, parts: Iterable[str]) -> list[str]:
        """Remember the tokens of new parts; return those with a piece that is new itself."""
        missing, findall, length = [], self._pieces.findall, self._lengths.__getitem__
        for part in parts:
            try:
                self._known[part] = sum(map(length, findall(part)))
            except KeyError:
                missing.append(part)
        return missing

    def agrees(self, parts: Sequence[str], ids: Sequence[int]) -> bool:
        """Whether both ends of a text have the ids that tokenising them whole gives."""
        head = _first(parts)
        tail = _first(parts[len(head):][::-1])[::-1]
        first = super().encode(head)
        last = encode(self.tokenizer, self._anchor + "".join(tail))[len(self._anchor_ids):]
        return (self._sound and list(ids[:len(first)]) == first
                and list(ids[len(ids) - len(last):]) == last and len(ids) == self.count(parts))

    def _lead(self, part: str) -> int:
        """Tokens that a text has more because it begins with this part."""
        if not self._anchor or not part:
            return 0
        piece = self._pieces.match(part)[0]
        return len(encode(self.tokenizer, piece)) - len(self._ids[piece])

    def _learn(self, pieces: Iterable[str]) -> None:
        new = sorted(set(pieces).difference(self._ids))
        if not new:
            return
        coded = self.tokenizer([self._anchor + piece for piece in new], add_special_tokens=False,
                               verbose=False)["input_ids"]
        skip = len(self._anchor_ids)
        for piece, ids in zip(new, coded, strict=True):
            self._sound &= list(ids[:skip]) == self._anchor_ids
            self._ids[piece] = list(ids[skip:])
            self._lengths[piece] = len(self._ids[piece])


def _first(parts: Sequence[str]) -> Sequence[str]:
    """The first parts that together have so many characters as are checked."""
    sizes = accumulate(map(len, parts))
    return parts[:next((i for i, size in enumerate(sizes, 1) if size >= _CHECKED_CHARS), None)]


def choose_text(tokenizer: Any, parts: Sequence[str]) -> WholeText:
    """The quickest way to tokenise that is right for this text, and so for others of its kind."""
    ids = WholeText(tokenizer).encode(parts)
    for anchor in _ANCHORS:
        for pieces in _PIECES:
            text = PiecedText(tokenizer, pieces, anchor)
            if text.encode(parts) == ids and text.count(parts) == len(ids):
                return text
    return WholeText(tokenizer)
