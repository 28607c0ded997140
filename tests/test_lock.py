"""One process at a time works on an output; a lock of one that is gone stops nobody."""

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from extend import lock
from extend.errors import BusyError, CheckpointError
from extend.lock import holding
from extend.output import atomic_directory
from extend.run import run

HOLD = """
import sys, time
from extend.lock import holding
with holding(sys.argv[1], inside=len(sys.argv) > 2):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(*arguments: object) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, *map(str, arguments)],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def elsewhere(block):
    """Call it where this thread's locks are not its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(block).result()


def hold_and_leave(out: Path) -> None:
    with holding(out):
        pass


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file system such as NFS without its lock service."""
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(lock, "_WRITTEN_IN_SECONDS", 0.02)
    monkeypatch.setattr(lock, "_told", set())


def test_another_process_is_refused_and_named_until_it_is_killed(tmp_path: Path):
    """By stages, and by `extend run` in the directory of another run."""
    out, run_out = tmp_path / "out", tmp_path / "run"
    run_out.mkdir()
    (tmp_path / "model").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nstages: [{stage: rescale, name: a, model: model, to: 64}]\n")
    for path, arguments, attempt in (
            (out, (out,), lambda: atomic_directory(out).__enter__()),
            (run_out, (run_out, "inside"), lambda: run(recipe, run_out))):
        holder = start_holder(*arguments)
        try:
            with pytest.raises(BusyError) as caught:
                attempt()
            assert str(caught.value).startswith(f"{path}: process {holder.pid} (-c ")
            assert ", begun 20" in str(caught.value)
            assert str(caught.value).endswith("+00:00, is at work on it; wait for its end, stop it,"
                                              " or choose another --out")
        finally:
            kill(holder)
    with atomic_directory(out) as partial:
        (partial / "file").write_text("content")
    with holding(run_out, inside=True):
        assert os.listdir(run_out) == [".run.lock"]
    assert sorted(os.listdir(tmp_path)) == ["model", "out", "recipe.yaml", "run"]
    assert os.listdir(run_out) == []


def test_the_same_work_may_hold_again_and_another_thread_may_not(tmp_path: Path):
    out = tmp_path / "new" / "out"
    with holding(out):
        hold_and_leave(out)
        with holding(out.parent / "other"), pytest.raises(BusyError, match="out: process "):
            elsewhere(lambda: hold_and_leave(out))
        with pytest.raises(BusyError):
            elsewhere(lambda: hold_and_leave(out))
    assert os.listdir(tmp_path) == []  # nor the folder that was made for the lock


def test_of_many_at_once_one_works_at_a_time(tmp_path: Path):
    """Each removes its lock, which the next may have opened just before."""
    inside, most, refused, done = [], [], [], []

    def work() -> None:
        while len(done) < 60:
            try:
                with holding(tmp_path / "out"):
                    inside.append(1)
                    most.append(len(inside))
                    done.append(1)
                    inside.pop()
            except BusyError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


@pytest.mark.parametrize("change", [
    {}, {"process_start": "1"}, {"pid": 2 ** 22 + 1}], ids=["alive", "reused", "gone"])
def test_without_locks_a_file_counts_while_its_process_lives(change, tmp_path: Path, no_locks,
                                                             caplog: pytest.LogCaptureFixture):
    out, file = tmp_path / "out", tmp_path / ".out.lock"
    file.write_text(json.dumps(lock._describe_me() | change))
    with caplog.at_level(logging.WARNING):
        if change:
            with atomic_directory(out):
                assert json.loads(file.read_text())["pid"] == os.getpid()
        else:
            with pytest.raises(BusyError, match=f"process {os.getpid()} .* is at work on it"):
                atomic_directory(out).__enter__()
    assert "this file system has no locks (No locks available)" in caplog.text
    assert os.listdir(tmp_path) == (["out"] if change else [".out.lock"])


@pytest.mark.parametrize("content", ["", "{}", None], ids=["empty", "not ours", "other machine"])
def test_without_locks_one_that_cannot_be_asked_is_told_how_to_pass(content, tmp_path: Path,
                                                                    no_locks):
    out, file = tmp_path / "out", tmp_path / ".out.lock"
    other = lock._describe_me() | {"machine": "another", "host": "node-\x1b[7", "pid": 12}
    file.write_text(json.dumps(other) if content is None else content)
    name = r"process 12 \(.*\) on node-\[7, begun" if content is None else "another process is"
    with pytest.raises(BusyError, match=rf"{name}.* if it is gone, delete {file}"):
        hold_and_leave(out)
    file.unlink()
    hold_and_leave(out)


def test_with_locks_one_of_another_machine_that_is_gone_is_told(
        tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / ".out.lock").write_text(json.dumps(
        lock._describe_me() | {"machine": "another", "host": "node-7", "pid": 12}))
    hold_and_leave(tmp_path / "out")
    assert "on node-7" in caplog.text and "so this process goes on" in caplog.text


def test_a_child_that_outlives_its_parent_holds_on_and_is_told(tmp_path: Path):
    """A fork shares the lock, so the work of a killed process may still be going on."""
    code = HOLD.replace('print("held"', 'import os\n    child = os.fork()\n'
                        '    child and print(child, flush=True)\n    child and print("held"')
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")],
                               stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.wait()
        with pytest.raises(BusyError, match="That process is gone, but one that it started"):
            hold_and_leave(tmp_path / "out")
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_lock_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="new/out: cannot be written .no space left on"):
        hold_and_leave(tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == []
