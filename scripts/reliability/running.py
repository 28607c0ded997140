"""`extend run` in a session of its own, forked from a process that has loaded everything once."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from torch import multiprocessing as mp

from tests.forked import enter_session, forked_workers
from tests.spawn import PRELOAD

_BEGAN = re.compile(r"^\[(\d+)/\d+\] (\S+) \((\w+)\)(.*)$", re.MULTILINE)
_PRELOAD = [*PRELOAD, "extend.gguf", "extend.publish", "extend.run_page", "extend.recipe_plan"]

Setup = Callable[[], object]


def become(recipe: Path, out: Path, log: Path, setup: Setup | None) -> None:
    """What the forked process does."""
    import extend.cli

    enter_session(log)
    with forked_workers():
        if setup is not None:
            setup()
        extend.cli.main(["-v", "run", str(recipe), "--out", str(out)])


class Running:
    """A run under way."""

    def __init__(self, recipe: Path, out: Path, log: Path, setup: Setup | None = None):
        self.log_file, self.began = log, time.monotonic()
        log.write_bytes(b"")
        mp.set_forkserver_preload(_PRELOAD)
        self.process = mp.get_context("forkserver").Process(
            target=become, args=(recipe, out, log, setup))
        self.process.start()
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode

    def stage(self) -> str | None:
        """The stage that is at work; None before the first."""
        working = [match[2] for match in _BEGAN.finditer(self.log) if "skipped" not in match[4]]
        return working[-1] if working else None

    def wait_for_work(self, among: Collection[str]) -> str | None:
        """Wait until one of these stages is at work, or the run has ended; return the stage."""
        while self.exit_code is None:
            stage = self.stage()
            if stage in among:
                return stage
            time.sleep(0.001)
        return self.stage()

    def send(self, number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def workers(self) -> list[int]:
        """Processes below this one, and those below them."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    stat = (entry / "stat").read_text().rpartition(") ")[2].split()
                    parents[int(entry.name)] = int(stat[1])
        found = [self.pid]
        for known in found:
            found += [child for child, parent in parents.items() if parent == known]
        return found[1:]

    def join(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.exit_code


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0] != "Z"
    except OSError:
        return False
