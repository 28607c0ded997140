"""What results hold so that each of their prompts can be built again, byte for byte."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError
from extend.evaluate.plan import PlannedTask
from extend.manifest import hash_file

# Whatever decides ids: vocabularies, merges, added tokens, and how texts are normalised or framed.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json",
    "chat_template.jinja", "chat_template.json")


def describe_run(record: Mapping[str, Any], planned: Sequence[PlannedTask], *, model: Path | str,
                 template: str, lengths: Sequence[int | str], depths: int | Sequence[float],
                 trials: int, base_len: int | None = None,
                 thinking: int = 0) -> dict[str, Any]:
    """The `run` of results.json: all that decides its prompts.

    Args:
        record: of the evaluation's manifest.
        planned: the tasks, whose `spec` is kept as it was given.
        model: directory of the tokenizer.
        lengths, depths, trials: for tasks without their own.
        base_len: native length of the base model, where it was asked too.
    """
    run = {"tasks": describe_tasks(planned), "lengths": list(lengths),
           "depths": depths if isinstance(depths, int) else list(depths), "trials": trials,
           "base_len": base_len, "seed": record["seed"], "template": template,
           "thinking": thinking, "tokenizer": hash_tokenizer(model),
           "inputs": record["inputs"], "versions": record["versions"]}
    return json.loads(json.dumps(run))


def describe_tasks(planned: Sequence[PlannedTask]) -> list[dict[str, Any]]:
    """Each task's options and label, as JSON."""
    return [{key: str(value) if isinstance(value, Path) else value
             for key, value in dict(entry.spec, name=entry.name).items()} for entry in planned]


def chance_levels(planned: Sequence[PlannedTask]) -> dict[str, float]:
    """Name of a task -> the score of guessing, of those that state one."""
    stated = {entry.name: getattr(entry.task, "chance", None) for entry in planned}
    return {name: float(chance) for name, chance in stated.items() if chance is not None}


def hash_tokenizer(model: Path | str) -> dict[str, Any]:
    """`{"sha256", "files": {name: sha256}}` of the files that make a checkpoint's tokenizer.

    Raises:
        CheckpointError: the directory holds none of them.
    """
    present = [Path(model) / name for name in _TOKENIZER_FILES]
    files = {path.name: hash_file(path) for path in present if path.is_file()}
    if not files:
        raise CheckpointError(f"{model}: holds no tokenizer; it has none of "
                              f"{', '.join(_TOKENIZER_FILES)}")
    whole = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return {"sha256": whole, "files": files}
