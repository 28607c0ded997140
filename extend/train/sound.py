"""Whether a checkpoint still holds what was written, by the hash of each of its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from extend.errors import CheckpointError
from extend.manifest import hash_file
from extend.model_config import read_json
from extend.output import write_json
from extend.train.mesh import Processes

HASHES_NAME = "hashes.json"
T = TypeVar("T")


def write_hashes(directory: Path, processes: Processes, group: dist.ProcessGroup | None = None,
                 ) -> None:
    """Hash the files of a complete checkpoint; all processes call it, each hashes its own.

    Args:
        group: what processes talk through; None: the default group.
    """
    own = {path.name: hash_file(path) for path in sorted(directory.glob(f"__{processes.rank}_*"))}
    hashes = {name: value for part in _gather(own, processes, group) for name, value in
              part.items()}
    if processes.is_main:
        hashes |= {path.name: hash_file(path) for path in sorted(directory.iterdir())
                   if path.name not in hashes}
        write_json(directory / HASHES_NAME, hashes)


def find_damage(directory: Path, processes: Processes) -> str | None:
    """What is wrong with a checkpoint, the same in all processes; None when it is whole.

    One without hashes, of an earlier version, cannot be checked. Each process reads a part.
    """
    hashes = processes.share(_read_hashes(directory) if processes.is_main else None)
    if isinstance(hashes, str):
        return hashes
    names = sorted(hashes)[processes.rank::processes.world]
    found = [damage for name in names if (damage := _damage(directory / name, hashes[name]))]
    return next((damage for part in _gather(found, processes, None) for damage in part), None)


def _read_hashes(directory: Path) -> Mapping[str, str] | str:
    if not (directory / HASHES_NAME).is_file():
        return {}
    try:
        return read_json(directory / HASHES_NAME)
    except CheckpointError as error:
        return str(error)


def _damage(path: Path, known: str) -> str | None:
    try:
        found = hash_file(path)
    except (OSError, CheckpointError) as error:
        return f"{path} cannot be read ({error})"
    return None if found == known else (f"{path} has the sha256 {found[:12]}, but was written with "
                                        f"{known[:12]}")


def _gather(own: T, processes: Processes, group: dist.ProcessGroup | None) -> list[T]:
    """The values of all processes."""
    if processes.mesh is None:
        return [own]
    values: list = [None] * processes.world
    dist.all_gather_object(values, own, group=group)
    return values
