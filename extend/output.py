"""Write files and directories so that a reader sees the old one, the new one, or none.

What is being written has a temporary name beside its final one, and is renamed when it is complete.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, RecipeError, SpaceError
from extend.lock import describe_refusal, holding

logger = logging.getLogger(__name__)

FINISHED_NAME = ".finished.json"
_RECORDING = threading.Lock()


def write_json(path: Path, data: object) -> None:
    """Write JSON so that readers see the old file or the new one."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename: readers see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise SpaceError when the file system of `directory` lacks `num_bytes`."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise SpaceError(f"{directory}: needs {_size(num_bytes)} but only {_size(free)} are "
                         "free; free space or choose another --out")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes:,} bytes"


def require_new(out: Path | str, *, overwrite: bool = False) -> None:
    """Raise CheckpointError when `out` is a file, or holds something that may not be replaced."""
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; give a directory as --out")
    if out.exists() and not overwrite and any(out.iterdir()):
        raise CheckpointError(f"{out}: exists already; give another --out, or --overwrite to "
                              "replace it")


def require_apart(out: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an `out` that would replace an input, or that an input folder would then hold.

    Args:
        inputs: role, for the message, to path.

    Raises:
        RecipeError: one of them lies in `out`, or `out` in it.
    """
    for role, path in inputs.items():
        if overlap(path, out):
            raise RecipeError(f"out {out} and {role} {path} lie in one another; choose an out of "
                              "its own")


def require_inputs_outside(out: Path | str, inputs: Mapping[str, Path | str]) -> None:
    """Refuse an `out` that is an input or holds one, because the output would take its place.

    An `out` inside an input's folder is no danger to it.

    Args:
        inputs: role, for the message, to path.

    Raises:
        RecipeError: an input lies in `out`, as they are written or where links lead.
    """
    for role, path in inputs.items():
        if _lies_in(Path(path), Path(out)):
            raise RecipeError(f"out {out} is or holds the {role} {path}, which the output would "
                              "replace; choose an out of its own")


def overlap(path: Path, other: Path) -> bool:
    """Whether one lies in the other or is it, as they are written or where links lead."""
    return _lies_in(path, other) or _lies_in(other, path)


def _lies_in(path: Path, folder: Path) -> bool:
    return (path.resolve().is_relative_to(folder.resolve())
            or path.absolute().is_relative_to(folder.absolute()))


@contextlib.contextmanager
def atomic_directory(out: Path | str, *, overwrite: bool = False,
                     inputs: Mapping[str, Path | str] | None = None,
                     mark: str | None = None) -> Iterator[Path]:
    """Yield a temporary directory that becomes `out` when the block ends without an error.

    Meanwhile no other process may write `out` (`extend.lock`).

    With a mark, files that the block reports to `keep_finished` outlive an interruption (also that
    of the whole process): the same call with the same mark finds them in the directory again, and
    `finished_files` names them. They do not outlive an error that is reported: bad inputs must
    change first, and on a full disk they would be in the way.

    Args:
        inputs: role -> path of what the block reads; see `require_inputs_outside`.
        mark: stands for everything that decides the output, such as `stamp_files` and options.

    Raises:
        RecipeError: see `require_inputs_outside`.
        BusyError: another process is at work on `out`.
        CheckpointError: `out` exists and `overwrite` is false, or the disk refuses a write.
    """
    require_inputs_outside(out, inputs or {})
    out = Path(out).absolute()
    with holding(out):
        require_new(out, overwrite=overwrite)
        with _filling(out.with_name(f".{out.name}.partial"), out, mark) as partial:
            yield partial


@contextlib.contextmanager
def _filling(partial: Path, out: Path, mark: str | None) -> Iterator[Path]:
    try:
        _prepare(partial, mark)
        yield partial
        (partial / FINISHED_NAME).unlink(missing_ok=True)
        _replace(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{out}: cannot be written ({describe_refusal(error)})") from error
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except BaseException:  # an interruption: what is finished may be used again
        if mark is None or not finished_files(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _prepare(partial: Path, mark: str | None) -> None:
    """Empty the temporary directory, but for files that were finished under the same mark."""
    if mark is None or _read_finished(partial).get("mark") != mark:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / FINISHED_NAME, {"mark": mark, "files": {}})
        return
    kept = {FINISHED_NAME, *finished_files(partial)}
    for path in partial.iterdir():
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def finished_files(partial: Path) -> dict[str, dict[str, Any]]:
    """`{name: {"bytes", "sha256"}}` of the whole files in a directory of `atomic_directory`."""
    files = _read_finished(partial).get("files")
    return {name: entry for name, entry in (files if isinstance(files, dict) else {}).items()
            if (partial / name).is_file() and (partial / name).stat().st_size == entry["bytes"]}


def keep_finished(path: Path, sha256: str) -> None:
    """Report a file that will not change any more, with the hash of its content.

    Does nothing in a directory that is not of `atomic_directory`.
    """
    with _RECORDING:
        record = _read_finished(path.parent)
        if record:
            entry = {"bytes": path.stat().st_size, "sha256": sha256}
            write_json(path.parent / FINISHED_NAME,
                       {**record, "files": {**record["files"], path.name: entry}})


def _read_finished(partial: Path) -> dict[str, Any]:
    try:
        record = json.loads((partial / FINISHED_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def stamp_files(inputs: Mapping[str, Path | str]) -> dict[str, list[Any]]:
    """Names, sizes and times of the inputs' files: what tells cheaply that one changed.

    Args:
        inputs: role -> a file, or a directory, of which the files directly in it count.
    """
    return {role: [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]
                   for file in _files_of(Path(path))] for role, path in inputs.items()}


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def _replace(partial: Path, out: Path) -> None:
    """Put `partial` in the place of `out`; the old `out` is gone only once the new one is there."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Delete a directory so that its name is never that of a half-deleted one."""
    doomed = _doomed(directory)
    shutil.rmtree(doomed, ignore_errors=True)
    if directory.exists():
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _doomed(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.removed")


def remove_leftover(directory: Path) -> None:
    """Delete what a finished output needs no more; that it cannot be deleted is no error."""
    try:
        remove_directory(directory)
        left = _doomed(directory) if _doomed(directory).exists() else None
    except OSError:
        left = directory
    if left is not None:
        logger.warning("%s: cannot be deleted; nothing needs it any more", left)


def copy_or_link(source: Path, destination: Path) -> None:
    """Hard-link a file that will never be changed in place, or copy it across file systems."""
    try:
        os.link(source.resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)
