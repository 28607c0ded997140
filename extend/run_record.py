"""What the directory of a run tells about it: `recipe.json`, and for every stage `run.json`."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError
from extend.model_config import read_json
from extend.output import write_json
from extend.secrets import without_secrets

RUN_RECORD = "run.json"
RECIPE_RECORD = "recipe.json"
PLAN_NAME = "plan.json"

RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"
UNCHECKED = "unchecked"
"""It was done, but a stage before it has run again since, and nobody has looked at it yet."""

Entries = dict[str, dict[str, Any]]


def read_entries(out: Path) -> Entries:
    """Stage -> its entry: `started` and `found` for `run`, and what `note_start` and others say.

    Raises:
        CheckpointError: the file is damaged.
    """
    return read_json(out / RUN_RECORD) if (out / RUN_RECORD).exists() else {}


def note_start(out: Path, name: str, fingerprint: str, found: Mapping[str, Any],
               later: Sequence[str]) -> None:
    """A stage starts, the first time or again; those after it must be looked at again.

    Args:
        found: of the output that lies there already: the fingerprint that it was made with and the
            hash of its manifest, both None where there is none.
        later: the stages after it.

    Raises:
        CheckpointError: the record cannot be written.
    """
    entries = read_entries(out)
    known = entries.get(name, {})
    starts = known.get("starts", 1) + 1 if known.get("started") == fingerprint else 1
    for other in later:
        if entries.get(other, {}).get("state") == DONE:
            entries[other] |= {"state": UNCHECKED}
    entries[name] = {"started": fingerprint, "found": dict(found), "state": RUNNING,
                     "starts": starts, "began": _now()}
    _write(out / RUN_RECORD, entries)


def note_end(out: Path, name: str, state: str, error: str | None = None) -> None:
    """A stage that was started has ended.

    Raises:
        CheckpointError: the record cannot be written.
    """
    entries = read_entries(out)
    entries[name] |= {"state": state, "ended": _now()} | ({"error": error} if error else {})
    _write(out / RUN_RECORD, entries)


def note_skip(out: Path, name: str) -> None:
    """A stage was found done; nothing is written when that was known."""
    entries = read_entries(out)
    if entries[name].get("state", DONE) != DONE:
        entries[name] = {key: value for key, value in entries[name].items() if key != "error"}
        entries[name]["state"] = DONE
        _write(out / RUN_RECORD, entries)


def keep_recipe(out: Path, record: Mapping[str, Any]) -> None:
    """Keep what the run was asked for; nothing is written when it is kept already.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = out / RECIPE_RECORD
    if not path.is_file() or read_json(path) != without_secrets(record):
        _write(path, record)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    try:
        write_json(path, without_secrets(data))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); free space or choose "
                              "another --out") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
