"""One process at a time works on an output; another is refused at once, and told by whom.

The lock is the kernel's (flock), on a file beside the output: it ends with the process, however
that ends. Where a file system has no such locks, the file itself stands for one and says who holds
it. Then a holder on this machine that is gone, or whose number another process has now, counts for
nothing; one on another machine cannot be asked, and the refusal says what to delete.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from extend.errors import BusyError, CheckpointError

logger = logging.getLogger(__name__)

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""What flock fails with on a file system that has no locks."""
_RUN_LOCK = ".run.lock"
_WRITTEN_IN_SECONDS = 0.2  # from the creation of a lock file to its content, with much to spare
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
_told: set[int] = set()


@contextlib.contextmanager
def holding(out: Path | str, *, inside: bool = False) -> Iterator[None]:
    """Keep other processes, and other threads of this one, from writing `out` in the block.

    What the block calls may hold it again. Directories that are made for the lock go with it,
    unless something was put into them.

    Args:
        inside: the lock lies in the directory `out` itself, which must never be replaced.

    Raises:
        BusyError: another process is at work on it.
        CheckpointError: no lock can be written there.
    """
    out = Path(out).absolute()
    file = out / _RUN_LOCK if inside else out.with_name(f".{out.name}.lock")
    file = file.parent.resolve() / file.name
    held = _HELD.get()
    if file in held:
        yield
        return
    made = [parent for parent in (file.parent, *file.parent.parents) if not parent.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        release = _take(file, out)
    except OSError as error:
        _remove_empty(made)
        raise CheckpointError(f"{out}: cannot be written ({describe_refusal(error)})") from error
    _HELD.set(held | {file})
    owner = os.getpid()
    try:
        yield
    finally:
        _HELD.set(held)
        if os.getpid() == owner:  # not in a fork, which shares the lock
            release()
            _remove_empty(made)


def describe_refusal(error: OSError) -> str:
    """Why a disk did not take a write, and what to do about it."""
    if error.errno == errno.ENOSPC:
        return "no space left on the device; free space or choose another --out"
    return str(error)  # with the file's name: it may be one of the inputs


def _remove_empty(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):  # the first that holds something ends it
        for directory in directories:
            directory.rmdir()


def _take(file: Path, out: Path) -> Callable[[], None]:
    """Lock `file`; return what gives it back."""
    if not _has_locks(file.parent):
        return _take_by_record(file, out)
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(lock, file):  # and was not removed between the two calls
                _tell_left(out, _parse(os.pread(lock, 1 << 16, 0)))
                _write(lock)
                return lambda: _give_back(file, lock)
        except BlockingIOError:
            os.close(lock)
            raise BusyError(_refuse(out, _parse(_read(file)))) from None
        except OSError:
            _give_back(file, lock)
            raise
        os.close(lock)


def _has_locks(directory: Path) -> bool:
    with tempfile.TemporaryFile(dir=directory, prefix=".lock.") as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            device = os.fstat(probe.fileno()).st_dev
            if device not in _told:
                _told.add(device)
                logger.warning("%s: this file system has no locks (%s); a file stands for one, and "
                               "outlives a process that is killed", directory, error.strerror)
            return False
    return True


def _is_there(lock: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), file.stat())
    except FileNotFoundError:
        return False


def _write(lock: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(_describe_me()).encode(), 0)


def _give_back(file: Path, lock: int) -> None:
    with contextlib.suppress(OSError):  # a disk that is read-only by now; the kernel's lock ends
        file.unlink()
    os.close(lock)


def _take_by_record(file: Path, out: Path) -> Callable[[], None]:
    """The same where the kernel has no lock: who creates the file holds it."""
    while True:
        try:
            lock = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            known = _read(file)
            holder = _parse(known)
            if known and _is_alive(holder) is False:
                _displace(file, known)
                continue
            if file.exists():
                raise BusyError(_refuse(out, holder, left=file)) from None
            continue
        try:
            _write(lock)
        except OSError:
            _give_back(file, lock)
            raise
        return lambda: _give_back(file, lock)


def _displace(file: Path, known: bytes) -> None:
    """Remove the lock of a process that is gone, and none that took its place meanwhile."""
    aside = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        file.rename(aside)
        if aside.read_bytes() == known:
            aside.unlink()
        else:
            aside.rename(file)


def _describe_me() -> dict[str, Any]:
    words = [Path(sys.argv[0]).name or "python", *sys.argv[1:2]]
    return {"pid": os.getpid(), "host": platform.node(), "machine": _machine(),
            "process_start": _process_start(os.getpid()),
            "command": " ".join(word for word in words if word.isprintable()),
            "began": datetime.now(UTC).isoformat(timespec="seconds")}


def _machine() -> str | None:
    """What numbers of processes are unique in: one start of one machine, or of one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: with its number it is unique."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the process is there; None when that cannot be known from here."""
    if holder.get("machine") is None or holder["machine"] != _machine():
        return None
    return _process_start(holder.get("pid", 0)) == holder.get("process_start")


def _read(file: Path) -> bytes:
    """The content of a lock file, which its holder may not have written yet."""
    end = time.monotonic() + _WRITTEN_IN_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if content := file.read_bytes():
                return content
        if time.monotonic() > end:
            return b""
        time.sleep(0.01)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("pid"), int) else {}


def _tell_left(out: Path, holder: dict[str, Any]) -> None:
    """Name a holder that did not give its lock back and that the kernel alone knows to be gone."""
    if holder and _is_alive(holder) is None:
        logger.warning("%s: %s did not finish it; it holds no lock any more, so this process goes "
                       "on", out, _name(holder))


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    named = {key: "".join(c for c in str(holder.get(key)) if c.isprintable())
             for key in ("pid", "command", "host", "began")}
    return "process {pid} ({command}) on {host}, begun {began},".format(**named)


def _refuse(out: Path, holder: dict[str, Any], left: Path | None = None) -> str:
    message = (f"{out}: {_name(holder)} is at work on it; wait for its end, stop it, or choose "
               "another --out")
    if left is not None and _is_alive(holder) is None:
        return (f"{message}. This file system has no locks, and from here that process cannot be "
                f"seen: if it is gone, delete {left}")
    if left is None and _is_alive(holder) is False:
        return f"{message}. That process is gone, but one that it started still holds its lock"
    return message
