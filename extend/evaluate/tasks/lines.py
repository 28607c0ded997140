"""A haystack of lines that all look like the fact, written as it is asked for."""

import random
from collections.abc import Callable
from typing import Any

from extend.errors import DataError
from extend.haystack import Haystack, Passage, encode, encode_lines

_LEAST = 2  # fewer lines would hide nothing


class Lines:
    """Passages made of lines, no two alike. What is left is filled with filler before them.

    Args:
        write: draws the next line; it ends with a line break.
        opening: stands before the first line.
        task: for messages.

    Attributes:
        written: lines in the last passage, and the fact that is to come.
    """

    def __init__(self, tokenizer: Any, write: Callable[[random.Random], str], task: str, *,
                 opening: str = ""):
        self.tokenizer, self.write, self.task = tokenizer, write, task
        self.opening = encode(tokenizer, opening, after_line=True)
        self.written = 0

    def window(self, num_tokens: int, rng: random.Random) -> Passage:
        """A passage of exactly `num_tokens`; facts go to the starts of lines alone.

        Raises:
            DataError: there is no room for several lines.
        """
        lines = self._fill(num_tokens - len(self.opening), rng)
        if len(lines) < _LEAST:
            raise DataError(f"{self.task}: {num_tokens} tokens are left for lines that hide the "
                            f"fact, which is room for {len(lines)}; ask for a longer length")
        rest = num_tokens - len(self.opening) - sum(map(len, lines))
        filler = Haystack.filler(self.tokenizer, rest).window(rest, rng).ids
        ids, boundaries = [*filler, *self.opening], []
        for line in lines:
            boundaries.append(len(ids))
            ids += line
        self.written = len(lines) + 1
        return Passage(ids, [*boundaries, len(ids)])

    def _fill(self, room: int, rng: random.Random) -> list[list[int]]:
        """As many lines as fit, tokenised in batches."""
        lines: list[list[int]] = []
        size, longest = 0, len(encode_lines(self.tokenizer, [self.write(rng)])[0])
        while True:
            batch = [self.write(rng) for _ in range(max(1, (room - size) // longest))]
            for line in encode_lines(self.tokenizer, batch):
                longest = max(longest, len(line))
                if size + len(line) > room:
                    return lines
                lines.append(line)
                size += len(line)
