"""Who does what, among processes that share a folder; and how much time is left."""

import time
from dataclasses import dataclass
from pathlib import Path

DECAY = 0.7  # of the old estimate of how much slower than expected this machine is


def claim(out: Path, name: str) -> bool:
    """Whether this process is the first in this run that wants the job of that name."""
    path = out / "claims" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def drop_claims(out: Path) -> None:
    """Forget who did what in an earlier run."""
    for path in (out / "claims").glob("*"):
        path.unlink()


@dataclass
class Clock:
    """Time that is left, and how this machine compares with what was expected.

    Attributes:
        deadline: of `time.time()`; None: no end.
        slowness: measured over expected seconds, of the work so far.
    """

    deadline: float | None
    slowness: float = 1.0

    def has(self, expected_seconds: float) -> bool:
        """Whether work of this many expected seconds still fits."""
        return (self.deadline is None
                or time.time() + expected_seconds * self.slowness < self.deadline)

    def learn(self, expected: float, measured: float) -> None:
        self.slowness = DECAY * self.slowness + (1 - DECAY) * measured / expected
