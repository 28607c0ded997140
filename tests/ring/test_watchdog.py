"""The watchdog: whom it ends a process for, when, and that it does."""

import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from extend.ring import watchdog
from extend.ring.watchdog import Awaited, Watchdog

ROOT = Path(__file__).parents[2]


class Scene:
    """A watchdog whose clock is set by hand, and what it would have said at the end."""

    def __init__(self):
        self.now, self.said, self.come, self.late = 100.0, [], set(), {}
        self.dog = Watchdog(clock=lambda: self.now, end=self.said.append)

    def await_(self, name, seconds=10, late=(5,)):
        """Have it look after a wait, for the ranks `late`."""
        self.late[name] = list(late)
        self.dog.watch(Awaited(
            3, f"do {name}", seconds, lambda: name in self.come, lambda: self.late[name]
        ))  # fmt: skip

    def look(self, after):
        """What it says `after` seconds."""
        self.now += after
        self.said.clear()
        self.dog.look()
        return self.said[0] if self.said else None


def test_what_comes_in_time_is_forgotten():
    scene = Scene()
    scene.await_("a")
    assert scene.look(after=9.9) is None
    scene.come.add("a")
    assert scene.look(after=100) is None
    assert not scene.dog._waiting and not scene.dog._told


def test_what_does_not_come_is_told_with_all_that_is_known():
    scene = Scene()
    scene.await_("this", seconds=2.5, late=[4, 7])
    assert scene.look(after=2.4) is None
    assert scene.look(after=0.2) == (
        "rank 3 has waited 2.6 s for ranks 4, 7 to do this; it died, hangs, or is slower than "
        "the time-out of 2.5 s: look for the first error in its log, or raise the time-out "
        "(timeout= of init_process_group). A GPU cannot stop waiting: this process ends"
    )


def test_flags_that_cannot_be_looked_at_do_not_save_the_process():
    scene = Scene()
    scene.await_("this")
    scene.late["this"] = None
    said = scene.look(after=10)
    assert "for another rank (which one cannot be told) to do this" in said


def test_time_begins_when_the_one_before_has_come():
    # The host runs ahead: a second of computation before each of a hundred waits is nobody's fault.
    scene = Scene()
    for i in range(100):
        scene.await_(i)
    for i in range(99):
        assert scene.look(after=1) is None
        scene.come.add(i)
    assert scene.look(after=1) is None  # the last one has its time from here on
    assert scene.look(after=9.9) is None
    assert "do 99" in scene.look(after=0.1)


def test_what_comes_later_gives_no_time_to_what_came_before():
    scene = Scene()
    for name in "abc":
        scene.await_(name)
    scene.come.add("c")
    assert scene.look(after=9) is None
    scene.come.add("b")
    assert "do a" in scene.look(after=1)


def test_the_first_in_the_program_is_the_cause():
    scene = Scene()
    scene.await_("a", late=[1])
    scene.await_("b", late=[2])
    assert "rank 1 to do a" in scene.look(after=10)


def test_a_shorter_time_out_counts_for_itself():
    scene = Scene()
    scene.await_("a", seconds=1000)
    scene.await_("b", seconds=10)
    assert "do b" in scene.look(after=10)


def test_who_is_behind_himself_accuses_nobody():
    scene = Scene()
    scene.await_("a", late=[])
    scene.await_("b", late=[2])  # who may well wait for this rank
    assert scene.look(after=10) is None
    assert scene.look(after=9) is None
    scene.come.add("a")
    assert scene.look(after=9) is None
    assert "rank 2 to do b" in scene.look(after=10)


def test_what_comes_while_flags_are_read_is_not_late():
    scene = Scene()
    scene.await_("a")

    def missing():
        scene.come.add("a")
        return [0, 1, 2]

    scene.dog._told[0].missing = missing
    assert scene.look(after=10) is None


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(watchdog, "MOST", 50)
    scene = Scene()
    for i in range(1000):
        scene.await_(i)
        if i % 100 == 0:
            assert scene.look(after=0.01) is None
    assert len(scene.dog._waiting) == 50 and len(scene.dog._told) == 50
    scene.come.update(range(999))
    scene.look(after=1)
    scene.look(after=1)
    assert "do 999" in scene.look(after=10)  # the last one was kept


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_thread_looks_until_it_is_stopped():
    prepared, asked, ended = [], [], []
    dog = Watchdog(end=ended.append, interval_seconds=0.01)
    dog.start(lambda: prepared.append(True))
    dog.start(lambda: prepared.append(False))  # there is one already
    dog.watch(Awaited(0, "fail", 0, lambda: asked.append(0) or fail(), lambda: [1]))
    wait_for(lambda: asked)
    dog.watch(Awaited(0, "come", 0, lambda: bool(asked.append(1)), lambda: [1]))
    wait_for(lambda: ended)
    dog.stop()
    assert not dog._thread.is_alive()
    assert prepared == [True] and "rank 1 to come" in ended[0]
    assert asked.count(0) == 1  # what cannot be asked is not asked again


def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


SCRIPT = """
    import logging, sys, threading, time
    from extend.ring import watchdog

    watchdog.SPEAKING_SECONDS = 0.5
    {setting}
    dog = watchdog.process_watchdog()
    assert dog is watchdog.process_watchdog()
    dog._interval = 0.05
    dog.start(lambda: None)
    dog.watch(watchdog.Awaited(0, "publish in lane 'keys'", {seconds}, lambda: False, lambda: [1]))
    {body}
"""
LINE = r"rank 0 has waited 0\.\d s for rank 1 to publish in lane 'keys'; it died"


def run(setting="", body="time.sleep(60)", seconds=0.01):
    script = textwrap.dedent(SCRIPT).format(setting=setting, body=body, seconds=seconds)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_a_process_whose_wait_never_comes_is_ended():
    result = run()
    assert result.returncode == -signal.SIGABRT
    assert re.fullmatch(rf"{LINE}.*this process ends\n", result.stderr)


def test_the_log_gets_the_line_too():
    result = run("logging.basicConfig(stream=sys.stdout, format='%(levelname)s %(message)s')")
    assert result.returncode == -signal.SIGABRT
    assert re.match(LINE, result.stderr)
    assert re.match(f"CRITICAL {LINE}", result.stdout)


def test_a_log_that_is_stuck_does_not_save_the_process():
    stuck = "logging.basicConfig(); logging.getLogger().handlers[0].lock.acquire()"
    result = run(stuck)
    assert result.returncode == -signal.SIGABRT
    assert re.match(LINE, result.stderr)


def test_a_process_that_comes_to_its_end_in_time_is_let_go():
    result = run(
        "import atexit; atexit.register(lambda: print(dog._thread.is_alive()))",
        "time.sleep(0.2)", seconds=60,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "False\n", "")


@pytest.fixture(autouse=True)
def no_process_is_ended(monkeypatch):
    monkeypatch.setattr(watchdog.os, "abort", lambda: pytest.fail("would have ended the tests"))
