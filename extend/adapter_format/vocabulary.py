"""The base's tokens beside an adapter, so that embedding deltas can be mapped by token string."""

from collections.abc import Mapping
from pathlib import Path

from extend.errors import CheckpointError
from extend.model_config import read_json
from extend.output import write_json

VOCABULARY_JSON = "extend_vocabulary.json"
_SCHEMA = 1


def write_adapter_vocabulary(directory: Path, tokens: Mapping[str, int]) -> None:
    """Write token -> row of the base's embedding, in the order of the rows."""
    ordered = dict(sorted(tokens.items(), key=lambda entry: entry[1]))
    write_json(directory / VOCABULARY_JSON, {"schema": _SCHEMA, "tokens": ordered})


def read_adapter_vocabulary(directory: Path) -> dict[str, int] | None:
    """What `write_adapter_vocabulary` wrote; None when there is no such file.

    Raises:
        CheckpointError: another schema, or no mapping of strings to rows.
    """
    path = directory / VOCABULARY_JSON
    if not path.is_file():
        return None
    data = read_json(path)
    tokens = data.get("tokens")
    if data.get("schema") != _SCHEMA or not isinstance(tokens, dict) or not all(
            isinstance(row, int) and row >= 0 for row in tokens.values()):
        raise CheckpointError(f"{path}: not a vocabulary of schema {_SCHEMA}; extract the adapter "
                              "again")
    return tokens
