"""RULER's needles: sentences that give a key a value, in noise, essays or other needles."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from extend.documents import read_documents
from extend.errors import DataError
from extend.evaluate.tasks.ruler.fit import (
    Draft,
    Room,
    cut_parts,
    draw_fitting,
    join_lines,
    largest_size,
    search_size,
)
from extend.evaluate.tasks.ruler.task import Ruler
from extend.evaluate.tasks.ruler.words import DRAWS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
Needle = tuple[str, ...]  # a sentence, in parts that come again and again but for key and value
_BEGIN = {kind: f"One of the special magic {kind} for" for kind in ("numbers", "uuids")}
_DEPTHS = [round(100 * i / 39) for i in range(40)]
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")

_ONE = ("A special magic {kind} is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the {kind} afterwards.\n",
        "What is the special magic {kind} for {query} mentioned in the provided text?",
        " The special magic {kind} for {query} mentioned in the provided text is")
_SEVERAL = ("Some special magic {kind} are hidden within the following text. Make sure to memorize "
            "it. I will quiz you about the {kind} afterwards.\n",
            "What are all the special magic {kind} for {query} mentioned in the provided text?",
            " The special magic {kind} for {query} mentioned in the provided text are")


@dataclass(kw_only=True)
class Niah(Ruler):
    """Find the values of the keys that are asked for."""

    new_tokens: ClassVar[int] = 128
    haystack: ClassVar[Literal["noise", "needle", "essay"]] = "noise"
    key_kind: ClassVar[str] = "words"
    value_kind: ClassVar[str] = "numbers"
    num_keys: ClassVar[int] = 1
    num_values: ClassVar[int] = 1
    num_queries: ClassVar[int] = 1

    def drafts(self, make_room: Callable[[Draft], Room], length: int, seed: int,
               where: str) -> Iterator[Draft]:
        rng = Random(seed)
        step = 500 if self.haystack == "essay" else 25 if length >= 4096 else 5

        def draw(size: int) -> Draft:
            return self._draw(rng, seed, size)

        first = draw(step)
        room = make_room(first)
        size = search_size(draw, room, step, largest_size(room, first, step))
        while True:
            yield draw_fitting(draw, room, size, step, where)

    def _draw(self, rng: Random, seed: int, size: int) -> Draft:
        keys, values, needles = [], [], []
        for _ in range(self.num_keys):
            keys.append(DRAWS[self.key_kind](rng))
            values.append([DRAWS[self.value_kind](rng) for _ in range(self.num_values)])
            needles += [self._needle(keys[-1], value) for value in values[-1]]
        Random(seed).shuffle(needles)
        context = self._hide(rng, size, needles)
        asked = rng.sample(range(self.num_keys), self.num_queries)
        return self._ask(context, [keys[i] for i in asked], [v for i in asked for v in values[i]])

    def _needle(self, key: str, value: str) -> Needle:
        first, hyphen, rest = key.partition("-")
        return _BEGIN[self.value_kind], f" {first}", hyphen + rest, " is:", f" {value}."

    def _hide(self, rng: Random, size: int, needles: Sequence[Needle]) -> list[str]:
        """The haystack with the needles, as parts."""
        lines: list[tuple[str, ...]] = [(NOISE,)] * size
        if self.haystack == "needle":
            key, value = DRAWS[self.key_kind], DRAWS[self.value_kind]
            lines = [self._needle(key(rng), value(rng)) for _ in range(size)]
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return list(join_lines(lines, "\n"))

    def _ask(self, context: list[str], queries: list[str], references: list[str]) -> Draft:
        single = self.num_queries * self.num_values == 1
        intro, question, prefix = _ONE if single else _SEVERAL
        query = queries[0] if len(queries) == 1 else (
            ", ".join(queries[:-1]) + ", and " + queries[-1])
        names = {"kind": self.value_kind[:-1] if single else self.value_kind, "query": query}
        end = cut_parts([context[-1] + "\n", question.format(**names)])
        return Draft([intro.format(**names), *context[:-1], *end], prefix.format(**names),
                     references)


@dataclass(kw_only=True)
class NiahSingle1(Niah):
    """One number, in a line of noise that is repeated."""

    name: ClassVar[str] = "ruler-niah_single_1"


@dataclass(kw_only=True)
class NiahMultikey2(Niah):
    """One number; the haystack is other needles."""

    name: ClassVar[str] = "ruler-niah_multikey_2"
    haystack: ClassVar[Literal["needle"]] = "needle"


@dataclass(kw_only=True)
class NiahMultikey3(Niah):
    """One UUID that belongs to another UUID; the haystack is other needles."""

    name: ClassVar[str] = "ruler-niah_multikey_3"
    haystack: ClassVar[Literal["needle"]] = "needle"
    key_kind: ClassVar[str] = "uuids"
    value_kind: ClassVar[str] = "uuids"


@dataclass(kw_only=True)
class _InEssays(Niah):
    """Needles between the sentences of essays.

    The published scripts find sentences with a model that NLTK downloads. Here one ends with `.`,
    `!` or `?` and the quotes and brackets after it, so needles may lie at other sentences.

    Args:
        essays: a JSON file with the key `text`, as the published scripts make it, or any file or
            folder of text (see `extend.documents`); used again from its start when it ends.
    """

    haystack: ClassVar[Literal["essay"]] = "essay"

    essays: str
    _sentences: list[list[str]] = field(default_factory=list, init=False, repr=False)

    def inputs(self) -> dict[str, str]:
        return {"essays": self.essays}

    def _hide(self, rng: Random, size: int, needles: Sequence[Needle]) -> list[str]:
        sentences = self._first_sentences(size)
        depths = rng.sample(_DEPTHS, len(needles))
        places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths)]
        lines: list[tuple[str, ...]] = []
        for begin, end, needle in zip(places, places[1:], needles):
            lines += [*_one_by_one(sentences[begin:end]), needle]
        lines += _one_by_one(sentences[places[-1]:])
        return cut_parts(join_lines(lines, " "))

    def _first_sentences(self, num_words: int) -> list[str]:
        """Sentences of so many words, the last one cut."""
        if not self._sentences:
            self._sentences = _split_sentences(_read_essays(self.essays))
        taken: list[str] = []
        for words in cycle(self._sentences):
            taken.append(" ".join(words[:num_words]))
            num_words -= len(words)
            if num_words <= 0:
                return taken
        return taken


def _one_by_one(sentences: Sequence[str]) -> list[tuple[str]]:
    """A line each. No sentence is an empty line: two spaces, as in the published scripts."""
    return [(sentence,) for sentence in sentences] or [("",)]


def _read_essays(path: str) -> str:
    file = Path(path)
    if file.suffix != ".json":
        return " ".join(read_documents(file))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise DataError(f"{path}: a JSON file of essays is an object with a text under 'text'")
    return content["text"]


def _split_sentences(text: str) -> list[list[str]]:
    """The words of each sentence."""
    sentences: list[list[str]] = [[]]
    for word in text.split():
        sentences[-1].append(word)
        if _SENTENCE_END.search(word):
            sentences.append([])
    if not sentences[-1]:
        sentences.pop()
    if not sentences:
        raise DataError("the essays hold no text")
    return sentences


@dataclass(kw_only=True)
class NiahSingle2(_InEssays):
    """One number in essays."""

    name: ClassVar[str] = "ruler-niah_single_2"


@dataclass(kw_only=True)
class NiahSingle3(_InEssays):
    """One UUID in essays."""

    name: ClassVar[str] = "ruler-niah_single_3"
    value_kind: ClassVar[str] = "uuids"


@dataclass(kw_only=True)
class NiahMultikey1(_InEssays):
    """One number in essays, among those of three other keys."""

    name: ClassVar[str] = "ruler-niah_multikey_1"
    num_keys: ClassVar[int] = 4


@dataclass(kw_only=True)
class NiahMultivalue(_InEssays):
    """Four numbers of one key in essays."""

    name: ClassVar[str] = "ruler-niah_multivalue"
    num_values: ClassVar[int] = 4


@dataclass(kw_only=True)
class NiahMultiquery(_InEssays):
    """The numbers of four keys in essays."""

    name: ClassVar[str] = "ruler-niah_multiquery"
    num_keys: ClassVar[int] = 4
    num_queries: ClassVar[int] = 4
