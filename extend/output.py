"""Write files and directories so that a reader sees the old one, the new one, or none.

What is being written has a temporary name beside its final one, and is renamed when it is complete.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from extend.errors import CheckpointError, RecipeError


def write_json(path: Path, data: object) -> None:
    """Write JSON under a temporary name, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise CheckpointError when the file system of `directory` lacks `num_bytes`."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(f"{directory}: needs {_size(num_bytes)} but only {_size(free)} are "
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


def overlap(path: Path, other: Path) -> bool:
    """Whether one lies in the other or is it, as they are written or where links lead."""
    return any(
        a.is_relative_to(b) or b.is_relative_to(a)
        for a, b in ((path.resolve(), other.resolve()), (path.absolute(), other.absolute())))


@contextlib.contextmanager
def atomic_directory(out: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `out` when the block ends without an error.

    Raises:
        CheckpointError: `out` exists and `overwrite` is false, or the disk refuses a write.
    """
    out = Path(out).absolute()
    require_new(out, overwrite=overwrite)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _replace(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{out}: cannot be written ({_reason(error)})") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "no space left on the device; free space or choose another --out"
    return str(error)  # with the file's name: it may be one of the inputs


def remove_directory(directory: Path) -> None:
    """Delete a directory so that its name is never that of a half-deleted one."""
    doomed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if directory.exists():
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def copy_or_link(source: Path, destination: Path) -> None:
    """Hard-link a file that will never be changed in place, or copy it across file systems."""
    try:
        os.link(source.resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)
