"""A GPU that waits for another rank cannot give up: a thread notices, and ends the process.

One thread a process is told of everything that a stream waits for, in the order of the program,
and looks about once a second at what has not come. The time of each runs from when the thread was
told or, if that is later, from when something before it came. Of what is overdue the first is
judged: ranks wait only for what comes earlier in the program that they share, so whatever holds
that up holds up the rest.

Ranks that did not do their part in time are named in one line, in the log and on stderr, and the
process aborts, as NCCL's watchdog has it. Where all did theirs, this GPU itself is behind, and
those who wait for it will say so.
"""

import atexit
import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from extend.ring.exchange import name_ranks

logger = logging.getLogger(__name__)

MOST = 1 << 14  # kept at a time; a GPU has far fewer under way
SPEAKING_SECONDS = 5.0  # for a log whose lock may be held by the thread that is stuck


@dataclass(slots=True)
class Awaited:
    """Something that a stream of this process waits for.

    Attributes:
        rank: this process, as numbered in the default group.
        what: what the others must do, after "to".
        seconds: how long they may take.
        has_come: whether the stream has come past the wait; True from then on.
        missing: the ranks, numbered like `rank`, that have not done it; None: that cannot be told.
        since: when its time began, by the watchdog's clock.
    """

    rank: int
    what: str
    seconds: float
    has_come: Callable[[], bool]
    missing: Callable[[], Sequence[int] | None]
    since: float = 0.0


class Watchdog:
    """Notices that what is waited for does not come, and ends the process."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[str], object] | None = None,
        interval_seconds: float = 1.0,
    ):
        """`end(message)` ends the process; None says the message and aborts."""
        self._clock, self._end, self._interval = clock, end or end_process, interval_seconds
        self._told: deque[Awaited] = deque(maxlen=MOST)  # by any thread
        self._waiting: list[Awaited] = []  # what of it has not come
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def watch(self, awaited: Awaited) -> None:
        """Look after it from now on. Costs the caller next to nothing."""
        awaited.since = self._clock()
        self._told.append(awaited)

    def start(self, prepare: Callable[[], object]) -> None:
        """Look from now on; `prepare` is called once, in the thread that looks."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(prepare,), name="ring watchdog", daemon=True
            )
            self._thread.start()
            atexit.register(self.stop)

    def stop(self) -> None:
        """Look no more: at the end of a process the GPU must not be asked."""
        self._stopped.set()
        self._thread.join(self._interval)

    def look(self) -> None:
        """Forget what has come; end the process if the oldest of the rest should have."""
        self._take_in()
        now, came, waiting = self._clock(), False, []
        for awaited in self._waiting:
            if awaited.has_come():
                came = True
                continue
            if came:
                awaited.since = now
            waiting.append(awaited)
        self._waiting = waiting
        overdue = next((a for a in waiting if now - a.since >= a.seconds), None)
        if overdue is not None:
            self._judge(overdue, now)

    def _take_in(self) -> None:
        while self._told and len(self._waiting) < MOST:
            self._waiting.append(self._told.popleft())

    def _judge(self, overdue: Awaited, now: float) -> None:
        missing = overdue.missing()
        done_by_all = missing is not None and not missing
        if not done_by_all and not overdue.has_come():  # nor has it while its flags were read
            self._end(explain(overdue, missing, now - overdue.since))

    def _run(self, prepare: Callable[[], object]) -> None:
        prepare()
        while not self._stopped.wait(self._interval):
            try:
                self.look()
            except RuntimeError:  # this GPU has failed, as the program's next call to it will say
                self._waiting.clear()


def explain(overdue: Awaited, missing: Sequence[int] | None, waited: float) -> str:
    """What has happened and what to do, in one line; `waited` in seconds."""
    names = name_ranks(missing) if missing else "another rank (which one cannot be told)"
    return (
        f"rank {overdue.rank} has waited {waited:.1f} s for {names} to {overdue.what}; it died, "
        f"hangs, or is slower than the time-out of {overdue.seconds:g} s: look for the first error "
        "in its log, or raise the time-out (timeout= of init_process_group). A GPU cannot stop "
        "waiting: this process ends"
    )


def end_process(message: str) -> None:
    """Say the message on stderr and in the log, and abort."""
    speaker = threading.Thread(target=_say, args=(message,), daemon=True)
    speaker.start()
    speaker.join(SPEAKING_SECONDS)
    os.abort()


def _say(message: str) -> None:
    os.write(2, f"{message}\n".encode())
    if logger.hasHandlers():  # without any, logging itself would write to stderr
        logger.critical(message)


@functools.cache
def process_watchdog() -> Watchdog:
    """The one of this process."""
    return Watchdog()
