"""`manifest.json`: what a stage read (with hashes), what it did, and what it wrote.

Everything but the time, the memory and the versions is the same for the same inputs and options.
"""

import hashlib
import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError
from extend.model_config import read_json
from extend.output import FINISHED_NAME, finished_files, write_json

MANIFEST_NAME = "manifest.json"
METRICS_NAME = "metrics.jsonl"
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "accelerate")


def hash_file(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    """`{relative name: {"bytes", "sha256"}}` of every file but the manifest, sorted by name.

    What was hashed while it was written is not read again.
    """
    known = finished_files(directory)
    files = sorted(p for p in directory.rglob("*")
                   if p.is_file() and p.name not in (MANIFEST_NAME, FINISHED_NAME))
    names = {p.relative_to(directory).as_posix(): p for p in files}
    return {name: known.get(name) or {"bytes": p.stat().st_size, "sha256": hash_file(p)}
            for name, p in names.items()}


def hash_content(path: Path | str) -> str:
    """One sha256 for a file, or for a directory's names and contents.

    Left out is how the directory came about: its manifest, and the metrics beside it. Their times
    are never the same twice, and what a stage makes of the directory does not depend on them.

    Raises:
        CheckpointError: nothing is there.
    """
    path = Path(path)
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    listing = {name: entry["sha256"] for name, entry in hash_files(path).items()}
    if (path / MANIFEST_NAME).is_file():
        listing.pop(METRICS_NAME, None)
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def describe_inputs(inputs: Mapping[str, Path | str]) -> dict[str, dict[str, str]]:
    """`{role: {"path", "sha256"}}` for the inputs of a stage."""
    return {role: {"path": str(path), "sha256": hash_content(path)}
            for role, path in inputs.items()}


class Manifest:
    """Collects the record of one stage from its start.

    Args:
        stage: its name, such as `rescale`.
        inputs: role -> path of everything it reads.
        options: everything else that decides its output; must be JSON.
        seed: of the stage's random choices, or None when it makes none.
    """

    def __init__(self, stage: str, inputs: Mapping[str, Path | str], options: Mapping[str, Any],
                 seed: int | None = None):
        self._start = time.monotonic()
        self.record: dict[str, Any] = {
            "schema": 1, "stage": stage, "inputs": describe_inputs(inputs),
            "options": json.loads(json.dumps(options)), "seed": seed, "versions": versions()}

    def write(self, directory: Path, **results: Any) -> None:
        """Hash the files in `directory` and write the manifest beside them."""
        self.record["results"] = results
        self.record["wall_seconds"] = round(time.monotonic() - self._start, 3)
        self.record["peak_memory_bytes"] = peak_memory()
        self.record["outputs"] = hash_files(directory)
        write_json(directory / MANIFEST_NAME, self.record)


def outputs_intact(directory: Path) -> str | None:
    """Return None when every file that the manifest lists is there with its size, else why not."""
    outputs = read_json(directory / MANIFEST_NAME).get("outputs", {})
    for name, entry in outputs.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            return f"its output {name} is missing or was changed"
    return None


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what computes."""
    found = {"python": platform.python_version()}
    for package in ("extend", *_PACKAGES):
        try:
            found[package] = importlib.metadata.version(
                "extend-context" if package == "extend" else package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process on the host, and per CUDA device that torch has used."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peak[f"cuda:{device}"] = torch.cuda.max_memory_allocated(device)
    return peak
