"""RULER's way to fit a text to a length: search a size once, then shrink single samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from extend.errors import DataError
from extend.evaluate.tasks.ruler.tokens import WholeText

# Samples of the smallest size that are tried before a length counts as too short. The published
# scripts try for ever.
_MAX_TRIES = 50


@dataclass(frozen=True, slots=True)
class Draft:
    """A sample before it is tokenised.

    Attributes:
        parts: the user's text, cut where lines or words begin.
        prefix: the beginning of the answer.
        references: what the answer should hold.
    """

    parts: list[str]
    prefix: str
    references: list[str]

    @property
    def text(self) -> str:
        """The user's text."""
        return "".join(self.parts)


@dataclass(frozen=True, slots=True)
class Room:
    """What a sample may take.

    Attributes:
        length: tokens of the whole sample, less those of a chat template and a BOS.
        new_tokens: tokens of them that are left to the answer.
        text: counts the tokens of the rest.
    """

    length: int
    new_tokens: int
    text: WholeText

    def takes(self, draft: Draft, more: int = 0) -> bool:
        """Whether a draft fits, with so many tokens besides."""
        return self.count(draft) + more + self.new_tokens <= self.length

    def count(self, draft: Draft) -> int:
        """Tokens of a draft and of the beginning of its answer."""
        return self.text.count([*draft.parts, draft.prefix])


def search_size(draw: Callable[[int], Draft], room: Room, low: int, high: int,
                more: int = 0) -> int:
    """The largest size that fits, by bisection with a new draft at every size.

    Drafts change what is drawn after them, so the sizes that are tried are part of the result:
    those of the published scripts.

    Args:
        low: smallest size; also what is returned when nothing fits.
        high: largest size.
        more: tokens besides the draft.

    Source: NVIDIA/RULER, scripts/data/synthetic/niah.py, `generate_samples`.
    """
    best = low
    while low <= high:
        middle = (low + high) // 2
        if room.takes(draw(middle), more):
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def largest_size(room: Room, draft: Draft, size: int) -> int:
    """Where to begin the search: about three times what fits, judged by a draft of that size."""
    return max(int(room.length / (room.count(draft) / size) * 3), size * 2)


def draw_fitting(draw: Callable[[int], Draft], room: Room, size: int, step: int,
                 where: str) -> Draft:
    """A draft of that size, or of the next smaller one that fits.

    Raises:
        DataError: none fits.
    """
    for _ in range(size // step + _MAX_TRIES):
        draft = draw(size)
        if room.takes(draft):
            return draft
        if size > step:
            size -= step
    raise DataError(f"{where}: a text of the smallest size, {size}, does not fit into "
                    f"{room.length - room.new_tokens} tokens beside an answer of "
                    f"{room.new_tokens}; ask for a greater length")


def cut_parts(texts: Iterable[str]) -> list[str]:
    """The same text as parts that tokenizers do not join.

    White space goes to the text after it, but for a line break after a sign. Nothing is cut at an
    empty line.
    """
    parts, begun = [], ""
    for text in texts:
        whole = begun + text
        body = whole.rstrip()
        space = whole[len(body):]
        if space == "\n" and not body[-1:].isalnum():
            body, space = whole, ""
        if body and "\n\n" not in space:
            parts.append(body)
            begun = space
        else:
            begun = whole
    return [*parts, begun] if begun else parts


def join_lines(lines: Sequence[Sequence[str]], between: str) -> Iterator[str]:
    """The parts of all lines, the last of each but the last with what stands between lines."""
    for line in lines[:-1]:
        yield from line[:-1]
        yield line[-1] + between
    yield from lines[-1]
