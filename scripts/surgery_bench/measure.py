"""Run a command and measure it: seconds, and the peak of its memory from /proc."""

import contextlib
import os
import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INTERVAL_SECONDS = 0.02


def run(command: Sequence[str], log: Path, *, environment: dict[str, str] | None = None,
        limit_seconds: float | None = None) -> dict[str, Any]:
    """Run `command` with its output in `log`.

    Returns:
        `seconds`, `cpu_seconds` (of all its threads, user and system; what others do on the same
        machine changes them less), `exit_code` (None when it was stopped at the limit), and of the
        process itself `anonymous_bytes` (peak of memory that no file backs) and `resident_bytes`
        (peak with mapped files). Its children are not counted.
    """
    with log.open("wb") as file:
        begin, busy = time.perf_counter(), _children_seconds()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   env={**os.environ, **(environment or {})})
        peak = {"anonymous_bytes": 0, "resident_bytes": 0}
        watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
        watcher.start()
        code: int | None
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        seconds = time.perf_counter() - begin
        watcher.join()
    return {"seconds": seconds, "cpu_seconds": _children_seconds() - busy, "exit_code": code,
            **peak}


def _children_seconds() -> float:
    """Of CPU, by all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(process: subprocess.Popen, peak: dict[str, int]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError, KeyError):  # an ended process has no sizes
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            sizes = {line.split(":")[0]: line.split()[1]
                     for line in lines if line.startswith(("Rss", "VmHWM"))}
            anonymous = int(sizes["RssAnon"]) + int(sizes["RssShmem"])
            peak["anonymous_bytes"] = max(peak["anonymous_bytes"], anonymous * 1024)
            peak["resident_bytes"] = max(peak["resident_bytes"], int(sizes["VmHWM"]) * 1024)
        time.sleep(_INTERVAL_SECONDS)


def drop_caches() -> bool:
    """Make the next reads come from the disk; whether that is allowed here."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
