"""The user's text as a haystack: read and tokenised once, and the numbers in it."""

import re
from dataclasses import dataclass, field
from typing import Any

from extend.documents import read_documents
from extend.haystack import Haystack

_LEAST = 2**20  # tokens: shorter rows have this much to draw passages from


@dataclass
class HeldText:
    """Text that a model was not trained on.

    Of more text than is needed, the documents that come first are used: a quarter more than the
    row, or than 1M tokens for a shorter row.

    Args:
        path: file or folder of text (see `extend.documents`).
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    path: str
    column: str = "text"
    _texts: list[str] | None = field(default=None, init=False, repr=False)
    _tokens: dict[int, Haystack] = field(default_factory=dict, init=False, repr=False)
    _numbers: frozenset[str] | None = field(default=None, init=False, repr=False)

    def haystack(self, tokenizer: Any, length: int) -> Haystack:
        """Enough of the text for rows of `length` tokens, if there is as much.

        Raises:
            DataError: no text, or a tokenizer without a tokenizer.json.
        """
        limit = max(length, _LEAST) * 5 // 4
        if limit not in self._tokens:
            self._tokens[limit] = Haystack.from_texts(tokenizer, self._read(), self.path, limit)
        return self._tokens[limit]

    def numbers(self) -> frozenset[str]:
        """Every string of five digits in the text: as a key it would be there twice."""
        if self._numbers is None:
            runs = (run for text in self._read() for run in re.findall(r"[0-9]{5,}", text))
            self._numbers = frozenset(run[i:i + 5] for run in runs for i in range(len(run) - 4))
        return self._numbers

    def _read(self) -> list[str]:
        if self._texts is None:
            self._texts = list(read_documents(self.path, column=self.column))
        return self._texts
