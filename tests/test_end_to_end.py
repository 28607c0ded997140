"""All stages as a user runs them; killed at each stage, the run ends with the same files.

Both runs go to the same `--out`, because an adapter and an evaluation tell the path of their model.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from torch import multiprocessing as mp

import extend.cli
from extend.curves import METRICS_NAME, PICTURE_NAME
from extend.manifest import MANIFEST_NAME, hash_files
from extend.run_page import PAGE_NAME
from extend.run_record import PLAN_NAME, RECIPE_RECORD, RUN_RECORD
from tests.forked import ENVIRONMENT, enter_session, forked_workers, run_python
from tests.page.structure import Structure
from tests.pipeline import STAGES, TIMINGS, write_inputs
from tests.spawn import PRELOAD

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 120  # for one line of a run to appear on a busy machine
MAX_TRIES = 4
Workers = Callable[[], AbstractContextManager[None]]  # how training processes are started


def one_interpreter() -> AbstractContextManager[None]:
    """The first training process is started, the others are forked."""
    return forked_workers(but=lambda env: env["RANK"] == "0")


def run_in_session(recipe: Path, out: Path, log: Path, workers: Workers) -> None:
    """`extend run` in a session of its own, all that it says in a file."""
    enter_session(log)
    with workers():
        extend.cli.main(["run", str(recipe), "--out", str(out), "-v"])


class Running:
    """A run to be killed; it is forked from a server that has loaded torch, which saves seconds.

    Its training processes are forked from it in turn, but for those that `workers` starts.
    """

    def __init__(self, recipe: Path, out: Path, workers: Workers):
        self.out, self._log = out, out.parent / "log.txt"
        self._log.write_bytes(b"")
        self.start = self._log.stat().st_mtime_ns
        mp.set_forkserver_preload(PRELOAD)
        self._process = mp.get_context("forkserver").Process(
            target=run_in_session, args=(recipe, out, self._log, workers))
        self._process.start()

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, reached: Callable[["Running"], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not reached(self):
            assert self._process.exitcode is None, f"it ended before it was killed:\n{self.log}"
            assert time.monotonic() < deadline, f"waited for nothing:\n{self.log}"
            time.sleep(0.0005)

    def end(self) -> None:
        """Wait until it has ended by itself, without an error."""
        self._process.join()
        assert self._process.exitcode == 0, self.log

    def descendants(self) -> list[int]:
        """Processes that it has started, and those that they have."""
        return [child.pid for child in psutil.Process(self._process.pid).children(recursive=True)]

    def kill(self, family: list[int], *, workers: bool) -> None:
        """SIGKILL the session and, as a power cut would, training processes in theirs.

        Without `workers` those are left to notice that they are orphans.
        """
        os.killpg(self._process.pid, signal.SIGKILL)
        if workers:
            for pid in family:
                send(pid, signal.SIGKILL)
        self._process.join()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(is_alive(pid) for pid in family):
            assert time.monotonic() < deadline, f"{family} outlive the run"
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself meanwhile
        os.kill(pid, number)


def written(out: Path) -> dict[str, dict]:
    """The files of every stage; of metrics what does not tell the time."""
    found = {}
    for stage in STAGES:
        files = {name: entry["sha256"] for name, entry in hash_files(out / stage).items()}
        files.pop(PICTURE_NAME, None)  # of the metrics, which tell the time
        if files.pop(METRICS_NAME, None):
            lines = (out / stage / METRICS_NAME).read_text().splitlines()
            files[METRICS_NAME] = [{key: value for key, value in json.loads(line).items()
                                    if key not in TIMINGS} for line in lines]
        found[stage] = files
    return found


def check_whole(out: Path) -> None:
    """What has its final name is complete, and is what its manifest says."""
    for stage in STAGES:
        if (out / stage).exists():
            manifest = json.loads((out / stage / MANIFEST_NAME).read_text())
            assert manifest["outputs"] == hash_files(out / stage)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def undisturbed(recipe) -> dict[str, dict]:
    """What a run without interruption writes to the `out` beside the recipe.

    One of its two training processes is an interpreter of its own, as a user's are.
    """
    out = recipe.parent / "out"
    Running(recipe, out, one_interpreter).end()
    check_whole(out)
    files = written(out)
    out.rename(recipe.parent / "undisturbed")
    return files


def said(text: str) -> Callable[[Running], bool]:
    return lambda running: text in running.log


def writes(stage: str) -> Callable[[Running], bool]:
    """The stage has begun to write; what a killed run has left there is older."""
    def reached(running: Running) -> bool:
        partial = running.out / f".{stage}.partial"
        with contextlib.suppress(FileNotFoundError):
            return partial.stat().st_mtime_ns > running.start
        return False

    return reached


@dataclass(frozen=True)
class Strike:
    """Kill the run in `stage`, at most `delay` seconds after `reached`.

    `workers` are interpreters of their own where it matters: while they start.
    """

    stage: str
    reached: Callable[[Running], bool]
    delay: float
    kill_workers: bool = True
    workers: Workers = forked_workers


STRIKES = [
    Strike("rescaled", writes("rescaled"), 0.002),
    Strike("long", said("[2/8] long"), 2.0, kill_workers=False,
           workers=contextlib.nullcontext),  # while they start
    Strike("long", said("saved step 2"), 0.1, kill_workers=False),
    Strike("long", writes("long"), 0.002),  # when all steps are done
    Strike("sibling", said("saved step 4"), 0.1),  # a run of one process
    Strike("adapter", writes("adapter"), 0.02),
    Strike("merged", writes("merged"), 0.005),
    Strike("eval-base", said("(2 of 6"), 0.05),
    Strike("eval-merged", writes("eval-merged"), 0.1),
    Strike("report", writes("report"), 0.1),
]


def hit(strike: Strike, recipe: Path, out: Path, rng: random.Random) -> None:
    """Kill a run; one that was faster is put back to before the stage, and killed sooner."""
    for attempt in range(MAX_TRIES):
        running, family = Running(recipe, out, strike.workers), []
        if strike.stage == "long":  # the others are one process
            running.wait_until(said("[2/8] long"))
            running.wait_until(lambda r: strike.reached(r) or len(r.descendants()) == 2)
            family = running.descendants()
        running.wait_until(strike.reached)
        time.sleep(rng.uniform(0, strike.delay) / 4 ** attempt)
        running.kill(family, workers=strike.kill_workers)
        check_whole(out)
        if not (out / strike.stage).exists():
            return
        for stage in STAGES[STAGES.index(strike.stage):]:
            shutil.rmtree(out / stage, ignore_errors=True)
    raise AssertionError(f"{strike.stage} was over each time before it could be killed")


def test_killed_at_every_stage_it_ends_the_same(recipe, undisturbed):
    rng, out = random.Random(0), recipe.parent / "out"
    for strike in STRIKES:
        hit(strike, recipe, out, rng)
    last = run_python(["-m", "extend", "run", recipe, "--out", out, "-v"], cwd=ROOT,
                      env=os.environ | ENVIRONMENT)
    assert last.returncode == 0, last.stderr
    assert [line.split(" ", 1)[1] for line in last.stderr.splitlines() if line.startswith("[")] == [
        "rescaled (rescale): done already, skipped", "long (train): done already, skipped",
        "sibling (train): done already, skipped", "adapter (extract): done already, skipped",
        "merged (merge): done already, skipped", "eval-base (eval): done already, skipped",
        "eval-merged (eval): done already, skipped", "report (report)"]
    check_whole(out)
    assert written(out) == undisturbed
    assert sorted(os.listdir(out)) == sorted([*STAGES, RUN_RECORD, RECIPE_RECORD, PLAN_NAME,
                                              PAGE_NAME])
    page = (out / PAGE_NAME).read_text(encoding="utf-8")
    Structure(page).check(out)
    for told in ("<b>8 of 8</b>", "nothing is missing", "passkey heat map of merged",
                 "Wavelength of each pair", "loss, nats a token, by step", "Mean residual",
                 "<b>Lineage.</b>", "The plan is for"):
        assert told in page, told
