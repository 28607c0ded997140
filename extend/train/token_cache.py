"""Token ids on disk, written once for all processes and runs, and mapped into memory by each.

An entry is a folder named by a hash of all that decides its ids: the content of the text, where in
it the text is found, the tokenizer and the libraries that apply it. It is written under a temporary
name and renamed, so it is whole or not there; its files carry sums that tell of damage afterwards.
Who finds no entry takes a lock and makes it; others of the same host wait for the lock and find it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from extend.errors import CheckpointError, TrainingError
from extend.lock import NO_LOCKS
from extend.output import write_json

logger = logging.getLogger(__name__)

FORMAT = 1  # of an entry, and of the way in which text becomes ids
_META = "meta.json"
_DTYPES = {"ids": np.int32, "offsets": np.int64, "answers": np.bool_}
_BLOCK = 1 << 23  # bytes that are read at once to sum them up
_NO_PLACE = {errno.EROFS, errno.EACCES, errno.EPERM}


def default_directory() -> Path:
    """`$EXTEND_CACHE/tokens`, else `extend/tokens` in the user's cache home."""
    if os.environ.get("EXTEND_CACHE"):
        return Path(os.environ["EXTEND_CACHE"]) / "tokens"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "extend" / "tokens"


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, one after the other; the arrays are mapped and cannot be written.

    Attributes:
        source: where they come from, for messages.
        ids: int32 [t].
        offsets: int64 [n + 1]; document i is ids[offsets[i]:offsets[i + 1]].
        answers: bool [t], tokens of answers; None for text.
        num_empty: documents that were left out because nothing is in them.
    """

    source: str
    ids: np.ndarray
    offsets: np.ndarray
    answers: np.ndarray | None
    num_empty: int

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (self.ids, self.offsets, self.answers)
                   if array is not None)


class TokenWriter:
    """Writes documents one by one, so that a corpus is never held in memory.

    Attributes:
        num_empty: documents that the caller left out; it counts them itself.
    """

    def __init__(self, directory: Path, stopped: threading.Event):
        self._directory, self._stopped = directory, stopped
        self._files: dict[str, IO[bytes]] = {}
        self._sums: dict[str, int] = {}
        self._tokens, self.num_empty = 0, 0
        self._write("offsets", np.zeros(1))

    def add(self, ids: np.ndarray, answers: np.ndarray | None = None) -> None:
        """Append a document: ids [n] and, for examples, which of them are answers, bool [n].

        Raises:
            TrainingError: the run ends meanwhile.
        """
        if self._stopped.is_set():
            raise TrainingError("tokenization was stopped, since the run ends")
        self._tokens += len(ids)
        self._write("ids", ids)
        self._write("offsets", np.asarray([self._tokens]))
        if answers is not None:
            self._write("answers", answers)

    def _write(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = (self._directory / f"{name}.bin").open("wb")
        data = np.ascontiguousarray(values, dtype=_DTYPES[name])
        self._sums[name] = zlib.crc32(data, self._sums.get(name, 0))
        self._files[name].write(data)

    def finish(self) -> None:
        """Write the record that makes the files an entry."""
        files = {}
        for name, file in self._files.items():
            file.flush()
            files[name] = {"bytes": file.tell(), "crc32": self._sums[name]}
        write_json(self._directory / _META,
                   {"format": FORMAT, "num_empty": self.num_empty, "files": files})

    def close(self) -> None:
        for file in self._files.values():
            file.close()


Build = Callable[[TokenWriter], None]
"""Tokenises all there is into the writer that it gets."""


class TokenCache:
    """Finds or makes entries.

    Args:
        directories: where entries are; those are written to the first one that can be. With none,
            tokens lie in a temporary file that goes when this process no longer maps it.
        hashes: path of a source -> hash of its content.
        is_main: whether to log what is found; what is made is logged by who made it.
        patience: seconds between looks at a lock that another process holds.
    """

    def __init__(self, directories: Sequence[Path] = (), hashes: Mapping[str, str] | None = None,
                 *, is_main: bool = False, patience: float = 0.2):
        self.directories, self.hashes = list(directories), dict(hashes or {})
        self.is_main, self.patience = is_main, patience
        self.stopped = threading.Event()

    def get(self, path: str, parts: Sequence[Any] | None, build: Build) -> Documents:
        """The tokens of a source, from the cache or made now.

        Args:
            path: of the source.
            parts: all that decides the ids beside the content of `path`, JSON; None: it cannot
                be told, and nothing is kept.

        Raises:
            CheckpointError: none of the directories can be written, or the disk is full.
            DataError: as `build`.
        """
        if not self.directories or parts is None or path not in self.hashes:
            return self._make_temporary(path, build)
        record = [FORMAT, self.hashes[path], *parts]
        key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:40]
        for directory in self.directories:
            found = read_entry(directory / key, path)
            if found is not None:
                self._tell(found, path, directory / key)
                return found
        refusals = []
        for directory in self.directories:
            try:
                return self._make(directory, key, path, build)
            except OSError as error:
                if error.errno not in _NO_PLACE:
                    raise CheckpointError(_cannot_write(directory, error)) from None
                refusals.append(_cannot_write(directory, error))
                if self.is_main:
                    logger.warning("%s", refusals[-1])
        raise CheckpointError("; ".join(refusals))

    def _tell(self, tokens: Documents, path: str, entry: Path) -> None:
        if self.is_main:
            logger.info("%s: %s", path, _describe(tokens, entry))

    def _make_temporary(self, path: str, build: Build) -> Documents:
        with tempfile.TemporaryDirectory(prefix="extend-tokens-") as directory:
            self._fill(Path(directory), build)
            return _map(Path(directory), path)  # the files stay as long as they are mapped

    def _make(self, directory: Path, key: str, path: str, build: Build) -> Documents:
        directory.mkdir(parents=True, exist_ok=True)
        entry = directory / key
        with self._locked(directory / f"{key}.lock") as is_alone:
            found = read_entry(entry, path)  # another process may have made it meanwhile
            if found is not None:
                self._tell(found, path, entry)
                return found
            if is_alone:
                for stale in directory.glob(f".{key}.*.partial"):
                    shutil.rmtree(stale, ignore_errors=True)
            if entry.exists():
                logger.warning("%s: is damaged, and made again", entry)
                _remove(entry)
            start = time.monotonic()
            partial = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".partial", dir=directory))
            try:
                self._fill(partial, build)
                partial.chmod(0o755)  # a cache may be shared
                _rename(partial, entry)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            tokens = _map(entry, path)
            logger.info("%s: tokenised in %.1f s, %s", path, time.monotonic() - start,
                        _describe(tokens, entry))
            return tokens

    def _fill(self, directory: Path, build: Build) -> None:
        with contextlib.closing(TokenWriter(directory, self.stopped)) as writer:
            build(writer)
            writer.finish()

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[bool]:
        """Hold a lock; yield whether there is one at all: some network disks have none.

        Without, two may make the same entry at once, and the one that is ready first stays.
        """
        with path.open("w") as lock:
            is_alone = True
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self.stopped.wait(self.patience):
                        raise TrainingError("waiting for tokens was stopped, since the run "
                                            "ends") from None
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    is_alone = False
                    break
            yield is_alone


def read_entry(entry: Path, source: str) -> Documents | None:
    """Map an entry; None when it is not there, or not as it was written."""
    try:
        meta = json.loads((entry / _META).read_text(encoding="utf-8"))
        whole = meta["format"] == FORMAT and all(
            _sum_up(entry / f"{name}.bin") == (known["bytes"], known["crc32"])
            for name, known in meta["files"].items())
        return _map(entry, source) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sum_up(path: Path) -> tuple[int, int]:
    """Bytes of a file and their sum."""
    size, total = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size, total = size + len(block), zlib.crc32(block, total)
    return size, total


def _map(entry: Path, source: str) -> Documents:
    meta = json.loads((entry / _META).read_text(encoding="utf-8"))
    arrays = {name: _map_file(entry / f"{name}.bin", dtype) if name in meta["files"] else None
              for name, dtype in _DTYPES.items()}
    ids = np.zeros(0, dtype=np.int32) if arrays["ids"] is None else arrays["ids"]
    return Documents(source, ids, arrays["offsets"], arrays["answers"], int(meta["num_empty"]))


def _map_file(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _rename(partial: Path, entry: Path) -> None:
    """Where there are no locks another may have been faster; then its entry is as good."""
    try:
        partial.rename(entry)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _remove(entry: Path) -> None:
    """Under another name first, so that nobody sees half of it; who maps it keeps it."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".partial", dir=entry.parent))
    entry.rename(doomed / "damaged")
    shutil.rmtree(doomed, ignore_errors=True)


def _describe(tokens: Documents, entry: Path) -> str:
    empty = f", {tokens.num_empty:,} empty ones left out" if tokens.num_empty else ""
    return (f"{len(tokens.offsets) - 1:,} documents{empty}, {len(tokens.ids):,} tokens, "
            f"{tokens.num_bytes / 2**30:.3f} GiB in {entry}")


def _cannot_write(directory: Path, error: OSError) -> str:
    return (f"{directory}: tokens cannot be written there ({error.strerror or error}); set "
            "token_cache to a directory with room for 4 bytes a token")
