"""The tokens that candidates are measured on: the same for all, one set to search, one to check.

Every document is cut in two, or short ones are dealt out in turn: the search sees one half, and
what it found is measured again on the other. Files are read in the order of their names, and no
further than 8 million characters, or 64 for each token of the target where that is more: what is
to count must come first. A document that was there before, to the letter, is left out; passages
that documents share are not found. The filler is the same in both halves, and only the facts that
are hidden in it differ.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extend.documents import list_files, read_documents, read_json_lines
from extend.errors import DataError
from extend.haystack import Haystack, prefix_ids
from extend.search.needles import NeedleRow, build_rows, fitting_facts

SEARCH, HELD_OUT = "search", "held-out"
SPLITS = (SEARCH, HELD_OUT)
_SHORT_DOCUMENT = 8000  # characters; shorter ones stay whole
_SIBLING_WINDOW = 2048  # tokens
_LEAST_WINDOWS = 4  # where the text has them: an interval needs some
_LIMIT = 64  # characters read for each token of a row: several passages in each half
_LEAST_LIMIT = 8_000_000
_SAMPLE = 20_000  # characters that tokenizers are compared on


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is measured; part of what an evaluation depends on.

    Attributes:
        rows: rows of a length that hide facts, half of them in text, half in filler.
        needles: facts in a row.
        short_tokens: about how many tokens of native-length windows.
        sibling_tokens: about how many tokens for each sibling.
    """

    rows: int
    needles: int
    short_tokens: int
    sibling_tokens: int


@dataclass(frozen=True, slots=True)
class SplitData:
    """One half of the data.

    Attributes:
        short: int64 [n, native length].
        siblings: name -> int64 [n, window].
        rows_by_length: those that `rows` has built.
    """

    tokenizer: Any
    haystacks: dict[str, Haystack]
    short: Tensor
    siblings: dict[str, Tensor]
    sizes: Sizes
    seed: str
    rows_by_length: dict[int, list[NeedleRow]] = field(default_factory=dict)

    def rows(self, length: int) -> list[NeedleRow]:
        """The rows of a length, the same at each call.

        Raises:
            DataError: text too short for the length.
        """
        if length not in self.rows_by_length:
            facts = fitting_facts(self.tokenizer, length, self.sizes.needles)
            self.rows_by_length[length] = build_rows(
                self.tokenizer, self.haystacks, length, num_rows=self.sizes.rows,
                num_facts=facts, rng=random.Random(f"{self.seed}/{length}"))
        return self.rows_by_length[length]


def read_sample(text: Path) -> str:
    """The first characters of a text, to compare tokenizers on.

    Raises:
        DataError: text that is missing or malformed.
    """
    sample = ""
    for document in _read_texts(text):
        sample += document[:_SAMPLE - len(sample)]
        if len(sample) >= _SAMPLE:
            break
    return sample


def build_splits(tokenizer: Any, text: Path, sibling_texts: dict[str, Path | None], *,
                 native_len: int, target_len: int, sizes: Sizes,
                 seed: int) -> dict[str, SplitData]:
    """Tokenise and cut; the filler is as long as the target.

    Args:
        sibling_texts: name -> its text, or None for the windows of `text`.

    Raises:
        DataError: text that is missing, malformed or too short.
    """
    limit = max(_LEAST_LIMIT, _LIMIT * target_len)
    window = min(native_len, _SIBLING_WINDOW)
    halves = _tokenise(tokenizer, text, limit, target_len)
    filler = Haystack.filler(tokenizer, target_len)
    own = {name: halves if path is None else _tokenise(tokenizer, path, limit, window)
           for name, path in sibling_texts.items()}
    prefix = prefix_ids(tokenizer)
    return {split: SplitData(
        tokenizer, {"text": halves[i], "filler": filler},
        cut_windows(halves[i], native_len, sizes.short_tokens, prefix),
        {name: cut_windows(parts[i], window, sizes.sibling_tokens, prefix)
         for name, parts in own.items()},
        sizes, f"{seed}/{split}") for i, split in enumerate(SPLITS)}


def cut_windows(haystack: Haystack, size: int, num_tokens: int, prefix: Sequence[int]) -> Tensor:
    """Windows spread evenly over the text without overlap, int64 [n, size], n >= 1.

    Raises:
        DataError: the text is shorter than one window.
    """
    body = size - len(prefix)
    count = min(max(_LEAST_WINDOWS, num_tokens // size), len(haystack.ids) // body)
    if count < 1:
        raise DataError(f"{haystack.source}: has {len(haystack.ids)} tokens, too few for a window "
                        f"of {body}; give more text")
    stride = len(haystack.ids) // count
    return torch.tensor([[*prefix, *haystack.ids[i * stride:i * stride + body].tolist()]
                         for i in range(count)])


def _tokenise(tokenizer: Any, path: Path, limit: int, least: int) -> list[Haystack]:
    """Both halves of a text, for the search and for the check; each needs `least` tokens."""
    halves: tuple[list[str], list[str]] = ([], [])
    documents = _read_once(path, limit)
    for number, document in enumerate(documents):
        for half, part in zip(halves, _cut(document, number)):
            if part.strip():
                half.append(part)
    if not all(halves):
        raise DataError(
            f"{path}: the text is too short: {sum(map(len, documents)):,} characters in "
            f"{len(documents)} different documents, of which one half is searched on and the "
            f"other checks what was found; a document is cut from {_SHORT_DOCUMENT:,} characters "
            f"on, and each half needs at least {least:,} tokens; give more text")
    return [Haystack.from_texts(tokenizer, half, f"{path} ({split} half)")
            for half, split in zip(halves, SPLITS)]


def _read_once(path: Path, limit: int) -> list[str]:
    """The first documents that hold anything, each once, until there are `limit` characters."""
    documents: dict[str, None] = {}
    read = 0
    for document in _read_texts(path):
        if document.strip() and document not in documents:
            documents[document] = None
            read += len(document)
        if read > limit:
            break
    return list(documents)


def _cut(document: str, number: int) -> tuple[str, str]:
    if len(document) < _SHORT_DOCUMENT:
        return (document, "") if number % 2 == 0 else ("", document)
    middle = document.find("\n", len(document) // 2) + 1 or len(document) // 2
    return document[:middle], document[middle:]


def _read_texts(path: Path) -> Iterator[str]:
    """Documents; a JSON line may hold `text`, or `prompt` and `answer` as a skill's examples do."""
    for file in list_files(path):
        if file.suffix != ".jsonl":
            yield from read_documents(file)
            continue
        for where, row in read_json_lines(file):
            text = row["text"] if "text" in row else f"{row.get('prompt')}{row.get('answer')}"
            if "text" not in row and not {"prompt", "answer"} <= set(row):
                raise DataError(f"{where}: has neither text nor prompt and answer; it has "
                                f"{', '.join(map(str, row))}")
            yield str(text)
