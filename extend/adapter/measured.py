"""Evaluations of adapters of several sizes, so that size can be set against measured quality."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extend.adapter_format.peft_files import ADAPTER_WEIGHTS, Adapter
from extend.errors import CheckpointError
from extend.inputs import local_path
from extend.manifest import MANIFEST_NAME, hash_content, read_manifest
from extend.results import Results, format_length, format_rate, read_results


@dataclass(frozen=True, slots=True)
class Score:
    """A share of right answers: of a task at a length, or of a skill (`length` is None)."""

    task: str
    length: int | None
    score: float
    n: int
    wilson_low: float
    wilson_high: float

    @property
    def measure(self) -> str:
        return self.task if self.length is None else f"{self.task} at {format_length(self.length)}"

    @property
    def text(self) -> str:
        return format_rate(asdict(self)) or ""


@dataclass(frozen=True, slots=True)
class Measured:
    """One results.json.

    Attributes:
        adapter: of the model that was scored; None for a model without one, to compare with.
        adapter_bytes, rank: size of its file and its largest rank; None without an adapter.
        weight: that it was merged with.
        losses: name -> nats a token.
    """

    label: str
    path: str
    adapter: str | None
    adapter_bytes: int | None
    rank: int | None
    weight: float
    scores: Sequence[Score]
    losses: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_measured(results: Mapping[str, Path | str]) -> list[Measured]:
    """Read results and find the adapters that were scored; small adapters first, then none.

    The adapter is the one that `eval` was given, or that the scored model was merged with.

    Args:
        results: label -> results.json or its directory.

    Raises:
        CheckpointError: a file is missing or of another format; a model or an adapter is not there
            any more, or was changed since; or several adapters were merged.
    """
    found = [_measured(entry) for entry in read_results(results)] if results else []
    return sorted(found, key=lambda m: (m.adapter_bytes is None, m.adapter_bytes or 0))


def _measured(results: Results) -> Measured:
    entry, weight = _find_adapter(results)
    size = rank = None
    if entry is not None:
        _check_unchanged(entry, results)
        adapter = Adapter(local_path(entry["path"]))
        size = (adapter.directory / ADAPTER_WEIGHTS).stat().st_size
        rank = max(module.rank for module in adapter.modules.values())
    summary = results.data["summary"]
    losses = {name: loss["loss"] for name, loss in summary["losses"].items()}
    return Measured(results.label, str(results.path), entry and entry["path"], size, rank, weight,
                    _scores(summary), losses)


def _scores(summary: Mapping[str, Any]) -> list[Score]:
    def score(task: str, length: int | None, entry: Mapping[str, Any]) -> Score:
        return Score(task, length,
                     *(entry[key] for key in ("score", "n", "wilson_low", "wilson_high")))

    grid = [score(name, int(length), entry) for name, task in summary["tasks"].items()
            for length, entry in task["lengths"].items()]
    return grid + [score(name, None, entry) for name, entry in summary["skills"].items()]


def _find_adapter(results: Results) -> tuple[Mapping[str, str] | None, float]:
    """The record of the adapter (path, sha256), and the weight that it was merged with."""
    model = results.data["model"]
    if model.get("adapter"):
        return model["adapter"], 1.0
    directory = Path(model["path"])
    if not directory.exists():
        raise CheckpointError(f"{results.path}: is of the model {directory}, which is not there, "
                              "so it cannot be seen which adapter was merged into it; score the "
                              "base with `extend eval BASE --adapter ADAPTER` instead")
    manifest = directory / MANIFEST_NAME
    record = read_manifest(directory) if manifest.is_file() else {}
    if record.get("stage") != "merge":
        return None, 1.0
    merged = [entry for role, entry in record["inputs"].items() if role.startswith("adapter")]
    if len(merged) != 1 or "tuned" in record["inputs"]:
        deltas = sorted(set(record["inputs"]) - {"target", "base", "rope_from", "layer_weights"})
        raise CheckpointError(f"{manifest}: {', '.join(deltas)} were merged, so {results.label} "
                              "has not the size of one adapter; leave its results out")
    weight = record["options"].get("weight", 1.0)
    return merged[0], weight[0] if isinstance(weight, list) else weight


def _check_unchanged(entry: Mapping[str, str], results: Results) -> None:
    directory = local_path(entry["path"])
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{results.path}: was measured with the adapter {directory}, which "
                              "is not there; its size is needed, so put it back")
    if hash_content(directory) != entry["sha256"]:
        raise CheckpointError(f"{results.path}: was measured with the adapter {directory} of "
                              f"sha256 {entry['sha256'][:16]}, but what is there now is of "
                              f"{hash_content(directory)[:16]}; measure again")
