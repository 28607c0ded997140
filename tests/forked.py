"""Python programs in processes that are forked with torch loaded, which saves seconds for each.

    done = run_python(["-m", "extend", "plan", "model"])      # as subprocess.run would
    process = ForkedPython([sys.executable, "script.py"])     # as subprocess.Popen would

The program is `__main__`, with arguments, environment and output of its own. What it has not is an
interpreter of its own: a test about what is imported, or about the command itself, starts one.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import multiprocessing as mp
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.spawn import PRELOAD

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def enter_session(log: Path) -> None:
    """Put this process, which was forked, into a session of its own that says all in a file."""
    os.setsid()
    os.environ |= ENVIRONMENT
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)


class ForkedPython:
    """`subprocess.Popen([python, *arguments])`, forked from the server of `tests.spawn`.

    With `server=False` it is forked from this process, which then has to be small: one that the
    server forked, before it has started threads of its own.
    """

    def __init__(self, command: Sequence[object], *, env: dict[str, str] | None = None,
                 cwd: Path | None = None, stdout: Any = None, stderr: Any = None,
                 start_new_session: bool = False, server: bool = True):
        mp.set_forkserver_preload(PRELOAD)
        outputs = [os.fspath(file) if isinstance(file, Path) else file and file.name
                   for file in (stdout, stderr)]
        self._process = mp.get_context("forkserver" if server else "fork").Process(
            target=_become, args=([str(part) for part in command[1:]], dict(env or os.environ),
                                  str(cwd or Path.cwd()), outputs, start_new_session))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked process", timeout)
        return self._process.exitcode


def run_python(arguments: Sequence[object], *, env: dict[str, str] | None = None,
               cwd: Path | None = None, timeout: float | None = None,
               ) -> subprocess.CompletedProcess[str]:
    """`subprocess.run([python, *arguments], capture_output=True, text=True)`, forked."""
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / name for name in ("stdout", "stderr")]
        process = ForkedPython([sys.executable, *arguments], env=env, cwd=cwd, stdout=files[0],
                               stderr=files[1])
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, 9)
            raise
        said = [file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
                for file in files]
    return subprocess.CompletedProcess(list(arguments), code, *said)


@contextmanager
def forked_workers(but: Callable[[dict[str, str]], bool] = lambda env: False) -> Iterator[None]:
    """Processes that torch's elastic launcher starts are forked from this one.

    Those are started as ever for whose environment `but` is true.
    """
    start = subprocess_handler.Popen

    def fork(**options: Any) -> ForkedPython | subprocess.Popen:
        if but(options["env"]):
            return start(**options)
        return ForkedPython(options.pop("args"), server=False, **options)

    with mock.patch.object(subprocess_handler, "Popen", fork):
        yield


def _become(arguments: list[str], env: dict[str, str], cwd: str, outputs: list[str | None],
            new_session: bool) -> None:
    if new_session:
        os.setsid()
    for stream, path in enumerate(outputs, start=1):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    if arguments[0] == "-u":  # as torchrun starts scripts; buffers are written out at the end
        arguments = arguments[1:]
    kind, *rest = arguments
    if kind == "-c":
        sys.path.insert(0, cwd)
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path.insert(0, cwd)
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).parent))
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
