"""Many documents as token ids, and where their lines begin."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from extend.errors import DataError

_BATCH_CHARS = 1 << 23  # text handed to the tokenizer's threads at once; bounds their memory
_AT_ONCE = 2  # batches: one gives its ids away, in one thread, while all others work on the next
_LOOKED_UP = 1 << 22  # ids whose lines are found at once; bounds the memory


def encode_documents(tokenizer: Any, texts: Iterable[str], source: str, purpose: str,
                     batch_chars: int = _BATCH_CHARS) -> Iterator[np.ndarray]:
    """Ids int32 [n] of each text, which ends with one line break, without special tokens.

    Texts are read as they are needed, and encoded by all cores; a few batches are held at a time.

    Args:
        purpose: what needs it, for the message.
        batch_chars: characters that are encoded at once.

    Raises:
        DataError: a tokenizer that cannot encode many texts at once.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{source}: {purpose} needs a fast tokenizer (tokenizer.json)")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # as any call of the tokenizer does that does not ask for it
    backend.no_padding()

    def encode(batch: list[str]) -> list[np.ndarray]:
        lines = [text.rstrip() + "\n" for text in batch]
        coded = backend.encode_batch_fast(lines, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int32) for one in coded]

    with ThreadPoolExecutor(_AT_ONCE, "tokens") as pool:
        ahead: deque[Future[list[np.ndarray]]] = deque()
        for batch in _batches(texts, batch_chars):
            ahead.append(pool.submit(encode, batch))
            if len(ahead) > _AT_ONCE:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


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
    parts = [ids[begin:begin + _LOOKED_UP] for begin in range(0, len(ids), _LOOKED_UP)]
    ends_line: dict[int, bool] = {}
    starts = []
    for number, part in enumerate(parts):
        used, places = np.unique(part, return_inverse=True)
        new = [int(i) for i in used if int(i) not in ends_line]
        texts = tokenizer.batch_decode([[i] for i in new], clean_up_tokenization_spaces=False)
        ends_line |= {i: text.endswith("\n") for i, text in zip(new, texts, strict=True)}
        ends = np.array([ends_line[int(i)] for i in used], dtype=bool)
        starts.append(np.flatnonzero(ends[places]) + (1 + number * _LOOKED_UP))
    return np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)
