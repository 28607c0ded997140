"""Finished evaluations on disk, one JSON line each, so that an interrupted search goes on."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError
from extend.search.measure import Items

EVALUATIONS_NAME = "evaluations.jsonl"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One candidate at one length on one half of the data.

    Attributes:
        candidate: what `describe` says of it; its `key` names the frequencies.
        items: values; those of short text and siblings are there once for a candidate and half.
    """

    candidate: Mapping[str, Any]
    length: int
    split: str
    items: Items
    seconds: float


class EvaluationStore:
    """The evaluations of one search.

    Args:
        path: of the JSON lines; the first line is the fingerprint.
        fingerprint: everything that decides the values of an evaluation; flat JSON.

    Raises:
        CheckpointError: the file belongs to another search, or is damaged.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]):
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._found: dict[tuple[str, int, str], Evaluation] = {}
        if path.exists():
            self._read()
        else:
            self._rewrite()

    def __len__(self) -> int:
        return len(self._found)

    def all(self) -> list[Evaluation]:
        return list(self._found.values())

    def get(self, key: str, length: int, split: str) -> Evaluation | None:
        return self._found.get((key, length, split))

    def add(self, evaluation: Evaluation) -> None:
        """Keep it; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(evaluation)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._keep(evaluation)

    def _keep(self, evaluation: Evaluation) -> None:
        place = (evaluation.candidate["key"], evaluation.length, evaluation.split)
        self._found[place] = evaluation

    def _read(self) -> None:
        """Take up whole lines; a process killed while it wrote leaves a torn last one."""
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(entry["fingerprint"])
                else:
                    self._keep(Evaluation(**{**entry, "items": Items(**entry["items"])}))
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):
                    raise CheckpointError(f"{self.path}:{number}: damaged ({error}); give another "
                                          "--out, or --overwrite to start again") from None
        self._rewrite()

    def _check(self, found: Mapping[str, Any]) -> None:
        differing = [key for key in {**found, **self.fingerprint}
                     if found.get(key) != self.fingerprint.get(key)]
        if differing:
            told = "; ".join(f"{key} was {found.get(key)!r} and is {self.fingerprint.get(key)!r}"
                             for key in differing)
            raise CheckpointError(f"{self.path}: holds evaluations of another search: {told}; give "
                                  "another --out, or --overwrite to start again")

    def _rewrite(self) -> None:
        lines = [json.dumps({"fingerprint": self.fingerprint}),
                 *(json.dumps(asdict(evaluation)) for evaluation in self._found.values())]
        temporary = self.path.with_name(f".{self.path.name}.partial")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        temporary.replace(self.path)
