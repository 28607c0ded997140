"""Many documents as token ids, and where their lines begin."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from extend.errors import DataError

_BATCH_CHARS = 1 << 24  # text handed to the tokenizer's threads at once; bounds their memory


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
