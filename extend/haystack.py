"""Hide facts in long text, in token ids: shared by training rows and evaluation prompts.

Everything is built from ids at an exact length; nothing is decoded and tokenised again, because
that changes ids and lengths. Facts are inserted where a line of the haystack begins.
"""

import bisect
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from extend.errors import DataError

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

    def __init__(self, ids: Sequence[int], line_starts: Sequence[int], source: str):
        self.ids, self.line_starts, self.source = ids, line_starts, source

    @classmethod
    def filler(cls, tokenizer: Any, num_tokens: int) -> "Haystack":
        """Repeated sentences about grass, at least `num_tokens` long."""
        unit = encode(tokenizer, FILLER)
        count = num_tokens // len(unit) + 2
        return cls(unit * count, range(0, len(unit) * count + 1, len(unit)), "repeated filler")

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Iterable[str], source: str) -> "Haystack":
        """Real text. Documents are separated by a line break.

        Raises:
            DataError: no text, or a tokenizer that cannot say where a token begins.
        """
        ids: list[int] = []
        line_starts: list[int] = []
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"{source}: hiding facts in text needs a fast tokenizer "
                            "(tokenizer.json)")
        for text in texts:
            text = text.rstrip() + "\n"
            coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True,
                              verbose=False)
            ends = [end for _, end in coded["offset_mapping"]]
            line_starts += [len(ids) + i + 1 for i, end in enumerate(ends)
                            if end and text[end - 1] == "\n"]
            ids += coded["input_ids"]
        if not ids:
            raise DataError(f"{source}: holds no text")
        return cls(ids, line_starts, source)

    def window(self, num_tokens: int, rng: random.Random) -> Passage:
        """Cut a passage of exactly `num_tokens` that ends where a line ends.

        Raises:
            DataError: the haystack is shorter than that.
        """
        first = bisect.bisect_left(self.line_starts, num_tokens)
        if num_tokens > 0 and first >= len(self.line_starts):
            raise DataError(f"{self.source}: has {len(self.ids)} tokens, too few for a passage of "
                            f"{num_tokens}; give more text or a shorter length")
        end = self.line_starts[rng.randrange(first, len(self.line_starts))] if num_tokens else 0
        begin = end - num_tokens
        low = bisect.bisect_right(self.line_starts, begin)
        high = bisect.bisect_left(self.line_starts, end)
        inner = [start - begin for start in self.line_starts[low:high]]
        return Passage(list(self.ids[begin:end]), [0, *inner, num_tokens])


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
