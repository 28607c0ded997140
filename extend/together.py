"""Processes of one launch, on one host or several: they fail together, and one error is told.

Each process looks every second whether another has written into the launcher's store that it has
failed, or writes no more at all, and then ends. So a host does not wait for one that is gone until
the time-outs of its collectives run out, and what failed for want of the first is not told beside
it.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.console import printable
from extend.errors import RankError, SilentRankError

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_SECONDS = 1.0
_LATER_SECONDS = 3
_GRACE_SECONDS = 1.0  # for the one that failed to tell it, before its launcher ends it too
_MOST_MISSES = 3
_SILENCE_SECONDS = 60.0
_CONNECT = timedelta(minutes=10)  # processes of a large launch do not start at once
_ANSWER = timedelta(seconds=30)
_FAILED, _ENDED = "failed", "ended"
LAUNCHED_BY_US = "EXTEND_LAUNCHED"
"""In the environment of processes whose launcher is `extend.train.launch`."""
# What gloo and NCCL say when the process at the other end of a connection is gone.
_BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
           "remote process exited", "NCCL communicator was aborted", "Socket closed",
           "Connection refused")

_board: "_Board | None" = None


def is_launched() -> bool:
    """Whether torchrun, accelerate or the like started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def host_number() -> int:
    """The host of this process among those of the launch, from 0."""
    return int(os.environ["RANK"]) // int(os.environ.get("LOCAL_WORLD_SIZE",
                                                         os.environ["WORLD_SIZE"]))


class _Board:
    """What the processes of a launch write into its store: that they live, and who failed first.

    Each watches the one after it, so that one that was killed is missed however many there are.
    """

    def __init__(self, store: "Store"):
        from torch.distributed import PrefixStore

        # A launcher that starts its processes again does so with the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"extend/{attempt}", store)
        self._rank, self._world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._store.set(f"process/{self._rank}", json.dumps(_identity()))
        self._store.set(f"alive/{self._rank}", "0")  # its first sign, and maybe its last
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="siblings", daemon=True)
        self._thread.start()

    def claim(self) -> bool:
        """Whether this process is the first to fail; a store that is gone knows no other.

        Where it is not, and the first is on another host, one line says so.
        """
        own = json.dumps({"rank": self._rank, "host": socket.gethostname(),
                          "host_number": host_number()})
        try:
            first = self._store.compare_set(_FAILED, "", own).decode()
        except (RuntimeError, OSError):
            return True
        if first != own:
            _point_to(json.loads(first))
        return first == own

    def close(self) -> None:
        self._done.set()
        self._thread.join(_ANSWER.total_seconds())
        with contextlib.suppress(RuntimeError, OSError):  # the launcher may be gone by now
            self._store.set(f"alive/{self._rank}", _ENDED)

    def _watch(self) -> None:
        next_one = (self._rank + 1) % self._world
        seen, since, beats, misses = b"", time.monotonic(), 0, 0
        while not self._done.wait(_POLL_SECONDS):
            beats += 1
            try:
                self._store.set(f"alive/{self._rank}", str(beats))
                if self._store.check([_FAILED]):
                    self._end_after(json.loads(self._store.get(_FAILED)))
                found = self._beat_of(next_one)
                misses = 0
            except (RuntimeError, OSError):
                misses += 1
                if misses == _MOST_MISSES:
                    self._end(RankError("stopped: the launcher on the first host cannot be reached "
                                        "any more"))
                continue
            if found != seen or found == _ENDED.encode():
                seen, since = found, time.monotonic()
            patience = _SILENCE_SECONDS if seen else _CONNECT.total_seconds()
            if time.monotonic() - since > patience and self.claim():
                self._end(SilentRankError(
                    f"process {next_one} has given no sign of life for {patience:.0f} s: "
                    f"{self._end_silent(next_one)}. The same command goes on from the last "
                    "checkpoint"))

    def _beat_of(self, rank: int) -> bytes:
        """Empty for one that has not started yet."""
        key = f"alive/{rank}"
        return self._store.get(key) if self._store.check([key]) else b""

    def _end_silent(self, rank: int) -> str:
        """End a process of this host that was stopped or hangs, which nothing else would; say so.

        It would keep its launcher waiting, its memory, and the lock of the run.
        """
        gone = "it or its host is gone: see the end of that host's output"
        key = f"process/{rank}"
        with contextlib.suppress(RuntimeError, OSError):
            if self._store.check([key]):
                known = json.loads(self._store.get(key))
                if known["began"] and known == _identity(known["pid"]):
                    # After this one, whose word its launcher would not wait for otherwise.
                    later = f"sleep {_LATER_SECONDS}; kill -9 {known['pid']}"
                    subprocess.Popen(["sh", "-c", later], start_new_session=True)
                    return (f"it was stopped or hung (pid {known['pid']} on {known['host']}), and "
                            "was ended")
        return gone

    def _end_after(self, first: dict[str, Any]) -> None:
        if first["rank"] == self._rank:
            self._done.set()
        elif not self._done.wait(_GRACE_SECONDS):
            _point_to(first)
            os._exit(1)

    def _end(self, why: RankError) -> None:
        if not self._done.wait(_GRACE_SECONDS):
            if not _leave_word(why):
                _say(str(why))
            os._exit(1)


def _identity(pid: int | None = None) -> dict[str, Any]:
    """What tells a process from all others of the launch: its number, where, and since when."""
    pid = os.getpid() if pid is None else pid
    began = ""
    with contextlib.suppress(OSError):  # Linux only; another process may have the number by now
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        began = stat.rpartition(")")[2].split()[19]
    return {"pid": pid, "host": socket.gethostname(), "began": began}


def _leave_word(why: RankError) -> bool:
    """Leave an error to the launcher of ours, which tells it; other launchers would not."""
    if LAUNCHED_BY_US not in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(why)
    return True


def _point_to(first: dict[str, Any]) -> None:
    """Say once on every other host where the error is told."""
    if first["host_number"] != host_number() and os.environ.get("LOCAL_RANK", "0") == "0":
        _say(f"stopped: process {first['rank']} on host {first['host_number']} ({first['host']}) "
             "has failed, and told why there")


def _say(text: str) -> None:
    sys.stderr.write(f"extend: {printable(text)}\n")
    sys.stderr.flush()


@contextmanager
def failing_together() -> Iterator[None]:
    """Let all processes of a launch end when one fails in the block, and only that one tell it.

    Nothing happens in a process that was started alone, or inside another such block.

    Raises:
        SystemExit: this process failed after another one.
        RankError: a connection to another process broke, and nobody has said why.
    """
    global _board
    if not is_launched() or _board is not None:
        yield
        return
    _board = _Board(_connect())
    try:
        yield
    except Exception as error:
        # Whoever broke the connection may be about to say why.
        if _is_broken(error):
            time.sleep(_POLL_SECONDS)
        if not _board.claim():
            raise SystemExit(1) from None
        if _is_broken(error):
            raise _lost(error) from error
        raise
    finally:
        _board.close()
        _board = None


def _connect() -> "Store":
    """A connection of this process's own to the store that the launcher tells of.

    Raises:
        RankError: there is none.
    """
    from torch.distributed import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=_CONNECT))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(f"process {os.environ['RANK']} on {socket.gethostname()}: cannot reach the "
                        f"launcher's store at {where} ({_first_line(error)}); see that this "
                        "address is one that every host can reach (docs/launch.md)") from None
    store.set_timeout(_ANSWER)
    return store


def _is_broken(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN)


def _lost(error: Exception) -> RankError:
    return RankError(f"process {os.environ['RANK']} on {socket.gethostname()}: the connection to "
                     f"another process broke ({_first_line(error)}); a process or a host is gone: "
                     "see the end of each host's output, and for memory its kernel log. The same "
                     "command goes on from the last checkpoint")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
