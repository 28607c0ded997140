"""What has to be alike on all hosts of a run, seen before anything is computed."""

import contextlib
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from extend.errors import CheckpointError, TrainingError
from extend.manifest import versions
from extend.together import host_number, is_launched
from extend.train.mesh import Processes

_PATIENCE_SECONDS = 30.0  # a network file system may show a new file late
_SAME_VERSIONS = ("extend", "torch", "transformers")


def check_hosts(inputs: Mapping[str, str], out: Path, processes: Processes) -> None:
    """Check that all hosts see one file system at `out`, the same inputs and the same software.

    Every process writes its part of a checkpoint, and reads the model and the text by itself. All
    processes call it; nothing is left behind.

    Args:
        inputs: role -> path of what is read.

    Raises:
        TrainingError: they do not; it names the hosts and what each has.
        CheckpointError: the directory of `out` cannot be written.
    """
    if processes.mesh is None or not is_launched() or _number_of_hosts() == 1:
        return
    with _token(out, processes) as token:
        views: list[Any] = [None] * processes.world
        dist.all_gather_object(views, _look(inputs, token))
    hosts = {view["number"]: view for view in views if view is not None}
    _require_shared(out, token, hosts)
    for what in ("inputs", "versions"):
        _require_same(what, hosts)


def _number_of_hosts() -> int:
    world = int(os.environ["WORLD_SIZE"])
    return -(-world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


@contextlib.contextmanager
def _token(out: Path, processes: Processes) -> Iterator[Path]:
    """A file that the main process writes where `out` will be, or in the folder that is there."""
    name: list[str | None] = [None]
    if processes.is_main:
        folder = next(p for p in out.parents if p.is_dir())
        name[0] = str(folder / f".extend-{uuid.uuid4().hex}")
        try:
            Path(name[0]).touch()
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); choose another "
                                  "--out") from None
    try:
        dist.broadcast_object_list(name, src=0, device=processes.device)
        yield Path(str(name[0]))
    finally:
        if processes.is_main:
            Path(str(name[0])).unlink(missing_ok=True)


def _look(inputs: Mapping[str, str], token: Path) -> dict[str, Any] | None:
    """What this host has; one process of each host looks."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    found = versions()
    return {"number": host_number(), "host": socket.gethostname(), "sees": _appears(token),
            "inputs": {f"{role} {path}": _describe(Path(path)) for role, path in inputs.items()},
            "versions": {name: found[name] for name in _SAME_VERSIONS}}


def _appears(token: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not token.exists():
        if not token.parent.is_dir() or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _describe(path: Path) -> str:
    """Files and bytes, and a digest of names and sizes; contents are not read."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sizes = [(p.relative_to(path).as_posix(), p.stat().st_size) for p in files]
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]
    return f"{len(sizes)} files of {sum(size for _, size in sizes):,} bytes (listing {digest})"


def _require_shared(out: Path, token: Path, hosts: Mapping[int, Mapping[str, Any]]) -> None:
    blind = [_name(view) for view in hosts.values() if not view["sees"]]
    if blind:
        raise TrainingError(
            f"{token.parent}: {', '.join(blind)} cannot see what {_name(hosts[0])} wrote there; "
            f"every process writes its part of a checkpoint beside --out {out}, so that must lie "
            "on a file system that all hosts share")


def _require_same(what: str, hosts: Mapping[int, Mapping[str, Any]]) -> None:
    first = hosts[0]
    for view in hosts.values():
        for key, value in view[what].items():
            known = first[what].get(key)
            if value != known:
                raise TrainingError(f"{what} differ between hosts: {key} is {known} on "
                                    f"{_name(first)}, {value} on {_name(view)}; give all hosts the "
                                    "same")


def _name(view: Mapping[str, Any]) -> str:
    return f"host {view['number']} ({view['host']})"
