"""Finished rows on disk, so that an interrupted evaluation goes on where it was."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError
from extend.model_config import read_json
from extend.output import remove_leftover, write_json

logger = logging.getLogger(__name__)
_IDENTITY = "run.json"
_ROWS = "rows.jsonl"


class RowStore:
    """A directory of JSON lines beside the output: one file of old rows, one of each process.

    Args:
        directory: made by `open`.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    @classmethod
    def open(cls, directory: Path, identity: Mapping[str, Any]) -> "RowStore":
        """Take up the rows in `directory`, or start anew when they are of another evaluation.

        Args:
            identity: everything that decides the rows; JSON.
        """
        store = cls(directory)
        identity = json.loads(json.dumps(identity))
        if directory.exists() and not store._is_of(identity):
            logger.info("%s: rows of another evaluation, removed", directory)
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / _IDENTITY, identity)
        store._consolidate()
        return store

    def _is_of(self, identity: Mapping[str, Any]) -> bool:
        try:
            return read_json(self.directory / _IDENTITY) == identity
        except CheckpointError:
            return False

    def _consolidate(self) -> None:
        """One file of whole lines: a process killed while it wrote leaves a torn last line."""
        rows = self.read()
        lines = [json.dumps({"cell": key, "row": row}) + "\n" for key, row in rows.items()]
        temporary = self.directory / f".{_ROWS}.partial"
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(self.directory / _ROWS)
        for path in self.directory.glob("rows-*.jsonl"):
            path.unlink()

    def read(self) -> dict[str, dict[str, Any]]:
        """Cell key -> row, of every process.

        Raises:
            CheckpointError: a damaged line that is not the last of its file.
        """
        rows = {}
        for path in sorted(self.directory.glob("rows*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, start=1):
                if not line:
                    continue
                try:
                    entry = json.loads(line)
                    rows[entry["cell"]] = entry["row"]
                except (ValueError, KeyError, TypeError) as error:
                    if number < len(lines):
                        raise CheckpointError(f"{path}:{number}: damaged ({error}); remove "
                                              f"{self.directory} to start again") from None
        return rows

    def append(self, rank: int, key: str, row: Mapping[str, Any]) -> None:
        """Add a finished row to this process's file; it is on disk when this returns."""
        line = json.dumps({"cell": key, "row": row}) + "\n"
        with (self.directory / f"rows-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        remove_leftover(self.directory)

    def remove_if_empty(self) -> None:
        """Leave nothing behind where there is nothing to go on from."""
        if not self.read():
            self.remove()
