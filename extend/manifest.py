"""`manifest.json`: what a stage read (with hashes), what it did, and what it wrote.

Everything but time, memory, machine and versions is the same for the same inputs and options.
Inputs are hashed in the background while the stage works, because hashing takes as long as reading.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import resource
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from extend.curves import METRICS_NAME, PICTURE_NAME
from extend.errors import CheckpointError
from extend.inputs.files import files_in_cache
from extend.inputs.names import name_inputs, recorded_name
from extend.model_config import read_json
from extend.output import FINISHED_NAME, finished_files, write_json
from extend.secrets import without_secrets
from extend.untrusted import path_problem

MANIFEST_NAME = "manifest.json"
_MOST_HASHERS = 2  # of one input: more would run far ahead of the work, which reads the same
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "accelerate", "mergekit")


def hash_file(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    """`{relative name: {"bytes", "sha256"}}` of every file but the manifest, sorted by name.

    What was hashed while it was written is not read again.
    """
    known, files = finished_files(directory), _files_of(directory)
    hashes = Hashes(path for name, path in files.items() if name not in known)
    return {name: known.get(name) or {"bytes": path.stat().st_size, "sha256": hashes.of(path)}
            for name, path in files.items()}


def _files_of(directory: Path) -> dict[str, Path]:
    """Relative name -> path, sorted by path, of every file but the manifest."""
    files = sorted(p for p in directory.rglob("*")
                   if p.is_file() and p.name not in (MANIFEST_NAME, FINISHED_NAME))
    return {path.relative_to(directory).as_posix(): path for path in files}


class Hashes:
    """The sha256 of files, computed by threads in the background, in the order that they are given.

    Stages read shards in that order too, so that what one reader fetches serves the other. Threads
    stop when this object is gone, and do not keep the process from ending.

    Args:
        paths: of files.
    """

    def __init__(self, paths: Iterable[Path]):
        self._stamps = {path: _stamp(path) for path in paths}
        self._found: dict[Path, Future[str]] = {path: Future() for path in self._stamps}
        jobs: queue.SimpleQueue[tuple[Path, Future[str]]] = queue.SimpleQueue()
        for path in self._stamps:
            jobs.put((path, self._found[path]))
        stopped = threading.Event()
        weakref.finalize(self, stopped.set)
        for _ in range(min(len(self._found), _MOST_HASHERS, os.cpu_count() or 1)):
            threading.Thread(target=_hash_all, args=(jobs, stopped), daemon=True).start()

    def of(self, path: Path) -> str:
        """Wait for the hash of a file.

        Raises:
            CheckpointError: the file cannot be read, or changed since it was asked for.
        """
        try:
            found = self._found[path].result()
            changed = _stamp(path) != self._stamps[path]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if changed:
            raise CheckpointError(f"{path}: was changed while it was being read; run the stage "
                                  "again")
        return found


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _hash_all(jobs: "queue.SimpleQueue[tuple[Path, Future[str]]]",
              stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            path, found = jobs.get_nowait()
        except queue.Empty:
            return
        try:
            found.set_result(hash_file(path))
        except OSError as error:
            found.set_exception(error)


class _Content:
    """One sha256 for a file, or for a directory's names and contents, once it is asked for.

    Left out is how a directory came about: its manifest, its metrics and their picture. Their times
    are never the same twice, and what a stage makes of the directory does not depend on them.

    Raises:
        CheckpointError: nothing is there.
    """

    def __init__(self, path: Path | str):
        self._path = Path(path)
        if self._path.is_file():
            self._files = {}
        elif self._path.is_dir():
            self._files = _files_of(self._path)
            if recorded_name(self._path):  # others keep files there too
                kept = files_in_cache(self._path)
                self._files = {name: self._files[name] for name in kept if name in self._files}
            if (self._path / MANIFEST_NAME).is_file():
                for name in (METRICS_NAME, PICTURE_NAME):
                    self._files.pop(name, None)
        else:
            raise CheckpointError(f"{path}: no such file or directory")
        self._hashes = Hashes(self._files.values() if self._path.is_dir() else [self._path])

    def sha256(self) -> str:
        """Wait for it; see `Hashes.of`."""
        if not self._path.is_dir():
            return self._hashes.of(self._path)
        listing = {name: self._hashes.of(path) for name, path in self._files.items()}
        return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def hash_content(path: Path | str) -> str:
    """One sha256 for a file, or for a directory's names and contents, less its own manifest.

    Raises:
        CheckpointError: nothing is there.
    """
    return _Content(path).sha256()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a stage's output, made sure to be one.

    Raises:
        CheckpointError: there is none, or it is not one: keys that are missing or of another
            kind, or outputs that do not lie in the directory.
    """
    path = directory / MANIFEST_NAME
    manifest = read_json(path)
    problem = _problem(manifest)
    if problem:
        raise CheckpointError(f"{path}: {problem}, so it is no stage's manifest; run the stage "
                              "again")
    return manifest


def _problem(manifest: Mapping[str, Any]) -> str | None:
    if not isinstance(manifest.get("stage"), str):
        return "has no 'stage'"
    for key in ("inputs", "outputs"):
        if not isinstance(manifest.get(key), dict):
            return f"has no {key!r}"
        for name, entry in manifest[key].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
                return f"{key} {name[:100]!r} has no sha256"
    for name, entry in manifest["outputs"].items():
        if problem := path_problem(name):
            return f"output {name[:100]!r} {problem}"
        if type(entry.get("bytes")) is not int:
            return f"output {name[:100]!r} has no bytes"
    return next((f"input {role[:100]!r} has no path" for role, entry in manifest["inputs"].items()
                 if not isinstance(entry.get("path"), str)), None)


def recorded_content(manifest: Mapping[str, Any]) -> str:
    """What `hash_content` gives for a stage's output, from its manifest alone."""
    listing = {name: entry["sha256"] for name, entry in manifest["outputs"].items()
               if name not in (METRICS_NAME, PICTURE_NAME)}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def describe_inputs(inputs: Mapping[str, Path | str]) -> dict[str, dict[str, str]]:
    """Role -> `describe_input`, for the inputs of a stage."""
    contents = {role: _Content(path) for role, path in inputs.items()}
    return {role: describe_input(inputs[role], content.sha256())
            for role, content in contents.items()}


def describe_input(path: Path | str, sha256: str) -> dict[str, str]:
    """What a record says of an input with this content.

    A commit of a repository is called `ORG/NAME@COMMIT`, wherever it is kept.
    """
    known = recorded_name(path)
    if known is None:
        return {"path": str(path), "sha256": sha256}
    return {"path": str(known), "repo": known.id.repo, "revision": str(known.id.revision),
            "sha256": sha256}


class Manifest:
    """Collects the record of one stage from its start.

    Args:
        stage: its name, such as `rescale`.
        inputs: role -> path of everything it reads.
        options: everything else that decides its output; must be JSON.
        seed: of the stage's random choices, or None when it makes none.

    Raises:
        CheckpointError: an input is not there.
    """

    def __init__(self, stage: str, inputs: Mapping[str, Path | str], options: Mapping[str, Any],
                 seed: int | None = None):
        self._start = time.monotonic()
        self._inputs = {role: (str(path), _Content(path)) for role, path in inputs.items()}
        self._record: dict[str, Any] = {
            "schema": 1, "stage": stage, "inputs": None,
            "options": name_inputs(json.loads(json.dumps(options))), "seed": seed,
            "versions": versions()}

    @property
    def record(self) -> dict[str, Any]:
        """What is known so far, with the inputs' hashes: waits for them when it is first asked for.

        Raises:
            CheckpointError: an input cannot be read, or changed since the start.
        """
        if self._record["inputs"] is None:
            self._record["inputs"] = {
                role: describe_input(path, content.sha256())
                for role, (path, content) in self._inputs.items()}
        return self._record

    def write(self, directory: Path, **results: Any) -> None:
        """Hash the files in `directory` and write the manifest beside them."""
        record = self.record
        record["results"] = name_inputs(results)
        record["wall_seconds"] = round(time.monotonic() - self._start, 3)
        record["peak_memory_bytes"] = peak_memory()
        record["machine"] = machine()
        record["outputs"] = hash_files(directory)
        write_json(directory / MANIFEST_NAME, without_secrets(record))


def outputs_intact(directory: Path) -> str | None:
    """Return None when every file that the manifest lists is there with its size, else why not."""
    for name, entry in read_manifest(directory)["outputs"].items():
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


def machine() -> dict[str, Any]:
    """What this process computes on: system, processor, its cores and memory, GPUs it has used."""
    torch = sys.modules.get("torch")
    used = torch is not None and torch.cuda.is_initialized()
    return {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count(),
            "memory_bytes": host_memory(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            if used else []}


def host_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    """The processor's name; on Linux only one file tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def host_peak() -> int:
    """Peak bytes of this process on the host."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process on the host, and per CUDA device that torch has used."""
    peak = {"host": host_peak()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():  # asking what is there starts a driver
        for device in range(torch.cuda.device_count()):
            peak[f"cuda:{device}"] = torch.cuda.max_memory_allocated(device)
    return peak
