"""Text and examples as token ids, tokenised into the cache a few documents at a time."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from extend.documents import list_files, read_documents, read_json_lines
from extend.encoding import encode_documents, find_lines
from extend.errors import DataError
from extend.haystack import Haystack, encode, prefix_ids, split_answer
from extend.manifest import hash_content
from extend.train.chat import encode_chat
from extend.train.token_cache import Build, Documents, TokenCache, TokenWriter


class TokenSource:
    """Tokenises sources, each once whatever uses it.

    Args:
        cache: where the tokens are kept.
    """

    def __init__(self, tokenizer: Any, cache: TokenCache):
        self.tokenizer, self._cache = tokenizer, cache
        self._mark = _describe(tokenizer)
        self._texts: dict[tuple[str, str], Documents] = {}

    def text(self, path: str, column: str) -> Documents:
        """The documents of a file or folder, without special tokens; each ends with a line break.

        Documents of white space alone are left out and counted.

        Raises:
            DataError: no text, or a tokenizer that cannot encode in parallel.
        """
        def build(writer: TokenWriter) -> None:
            texts = _filled(read_documents(path, column=column), writer)
            for ids in encode_documents(self.tokenizer, texts, path, "training text"):
                writer.add(ids)

        if (path, column) not in self._texts:
            self._texts[path, column] = self._get(path, ["text", column], build)
        return self._texts[path, column]

    def examples(self, path: str) -> Documents:
        """The examples of a JSON lines file or a folder of them, with their special tokens.

        A line has the texts `prompt` and `answer`, which get the tokenizer's own prefix and end of
        sequence, or `messages` (and perhaps `tools`), which its chat template writes as it does.

        Raises:
            DataError: a line with neither, or another kind of file.
        """
        eos = self.tokenizer.eos_token_id

        def build(writer: TokenWriter) -> None:
            prefix = prefix_ids(self.tokenizer)
            for where, row in _example_lines(path):
                if "messages" in row:
                    coded = encode_chat(self.tokenizer, row["messages"], row.get("tools"), where)
                else:
                    coded = _encode_pair(self.tokenizer, row, where, prefix, eos)
                writer.add(*map(np.asarray, coded))

        return self._get(path, ["examples", eos, self.tokenizer.chat_template], build)

    def _get(self, path: str, parts: list[Any], build: Build) -> Documents:
        suffix = Path(path).suffix if Path(path).is_file() else None  # it says how to read a file
        key = None if self._mark is None else [*parts, suffix, *self._mark]

        def build_checked(writer: TokenWriter) -> None:
            _require_same(path, self._cache.hashes.get(path))
            build(writer)

        documents = self._cache.get(path, key, build_checked)
        if not len(documents.ids):
            raise DataError(f"{path}: holds no text")
        return documents


def _require_same(path: str, known: str | None) -> None:
    """Other hosts may have other files there, and files may have changed since they were hashed."""
    found = None if known is None else hash_content(path)
    if found != known:
        raise DataError(f"{path}: has the sha256 {found[:12]}... here, but {known[:12]}... where "
                        "the main process read it at the start; give all hosts the same files")


def _encode_pair(tokenizer: Any, row: dict, where: str, prefix: list[int],
                 eos: int) -> tuple[list[int], list[bool]]:
    """The end of sequence is part of the answer, so that a skill learns to stop."""
    if not all(isinstance(row.get(key), str) for key in ("prompt", "answer")):
        raise DataError(f"{where}: an example needs the texts 'prompt' and 'answer', or "
                        f"'messages'; it has {', '.join(map(str, row))}")
    prompt, answer = split_answer(tokenizer, row["prompt"], row["answer"])
    if not answer:
        raise DataError(f"{where}: the answer is empty")
    ids = [*prefix, *prompt, *answer, eos]
    # White space that begins an answer is the model's to write, so it is trained too.
    begin = len(prefix) + min(len(prompt), len(encode(tokenizer, row["prompt"])))
    return ids, [False] * begin + [True] * (len(ids) - begin)


def _example_lines(path: str) -> Iterator[tuple[str, dict]]:
    for file in list_files(path):
        if file.suffix != ".jsonl":
            raise DataError(f"{file}: examples are read from .jsonl files only")
        yield from read_json_lines(Path(file))


def _filled(texts: Iterable[str], writer: TokenWriter) -> Iterator[str]:
    for text in texts:
        if text.strip():
            yield text
        else:
            writer.num_empty += 1


def _describe(tokenizer: Any) -> list[Any] | None:
    """What decides the ids of a text; None where it cannot be told."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # they are no part of it
    backend.no_padding()
    mark = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return [mark, prefix_ids(tokenizer), tokenizers.__version__, transformers.__version__]


def as_haystack(tokenizer: Any, documents: Documents) -> Haystack:
    """The documents as one haystack whose passages may be cut at every line."""
    return Haystack(documents.ids, find_lines(tokenizer, documents.ids), documents.source)
