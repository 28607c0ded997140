"""What a user may write for an input, and what records say of it."""

import functools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from extend.errors import RecipeError
from extend.hub import HubId

log = logging.getLogger(__name__)

_FORM = re.compile(r"(?P<repo>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")
_SNAPSHOT = re.compile(r".*[/\\]snapshots[/\\][0-9a-f]{40}(?:[/\\](?P<file>.+))?")
_CACHED_PATH = re.compile(r"[^\s\"']*models--[^\s\"'/\\]+[/\\]snapshots[/\\][0-9a-f]{40}"
                          r"(?:[/\\][\w./\\-]*\w)?")
_MANIFEST = "manifest.json"  # of a stage's output, which nobody takes for a repository


@dataclass(frozen=True, slots=True)
class HubInput:
    """A repository of the Hub, or one file of it: `ORG/NAME[@REVISION][:FILE]`."""

    id: HubId
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.id}:{self.file}" if self.file else str(self.id)

    @classmethod
    def parse(cls, text: str) -> "HubInput | None":
        """None when the text cannot name a repository."""
        match = _FORM.fullmatch(text)
        if match is None:
            return None
        try:
            return cls(HubId.parse(match["repo"] + (f"@{match['revision']}" if match["revision"]
                                                    else "")), match["file"])
        except RecipeError:
            return None


def as_hub_input(value: Path | str, parent: Path | None = None) -> HubInput | None:
    """What of the Hub an input names; None for a path. What is there as a path wins, and says so.

    Args:
        parent: where relative paths start; the working directory unless given.
    """
    found, path = HubInput.parse(str(value)), (parent or Path()) / value
    if found is None or not path.exists():
        return found
    if not (path / _MANIFEST).is_file():
        _tell_local(str(value))
    return None


@functools.cache
def _tell_local(value: str) -> None:
    log.info("%s: read from the disk, where it is, not from a repository of that name on the Hub",
             value)


def name_inputs(data: Any) -> Any:
    """JSON data with every path into the Hub's cache replaced by what it is called there."""
    if isinstance(data, dict):
        return {name_inputs(key): name_inputs(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [name_inputs(value) for value in data]
    if not isinstance(data, str) or "models--" not in data:
        return data
    if os.path.exists(data):  # also one with spaces in it
        return str(recorded_name(data) or data)
    return _CACHED_PATH.sub(lambda found: str(recorded_name(found[0]) or found[0]), data)


def recorded_name(path: Path | str) -> HubInput | None:
    """The repository, commit and file that a path in the Hub's cache belongs to."""
    known, match = HubId.of_cache(path), _SNAPSHOT.fullmatch(str(path))
    if known is None or match is None:
        return None
    return HubInput(known, match["file"] and PurePath(match["file"]).as_posix())
