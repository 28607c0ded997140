"""Start the processes of a run with torch's elastic launcher, or join those that are there."""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from extend import errors
from extend.errors import ExtendError, RankError, TrainingError
from extend.train_options import TrainOptions

logger = logging.getLogger(__name__)

_TAKEN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_GOES_ON = "goes on from the last checkpoint"
_POLL_SECONDS = 0.5
_PAUSE_SECONDS = 1.0  # before a restart: for what has failed to give back its memory

Job = Callable[[TrainOptions, Path, bool], None]


def count_processes(nproc: int | Literal["auto"]) -> int:
    """Processes of a run: those that torchrun or accelerate started, else `nproc`.

    Raises:
        TrainingError: more processes than visible GPUs, or another number than was started.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if "RANK" in os.environ:
        started = int(os.environ.get("WORLD_SIZE", 1))
        if nproc not in ("auto", started):
            raise TrainingError(f"nproc is {nproc}, but the launcher started {started} processes; "
                                "leave nproc out or make the two agree")
        return started
    wanted = max(gpus, 1) if nproc == "auto" else nproc
    if gpus and wanted > gpus:
        raise TrainingError(f"nproc is {wanted}, but only {gpus} GPUs are visible; ask for at most "
                            f"{gpus}")
    return wanted


def launch(job: Job, options: TrainOptions, out: Path, *, overwrite: bool, world: int) -> None:
    """Run `job(options, out, overwrite)` in `world` processes and wait for it.

    Raises:
        ExtendError: what the first failing process raised.
        RankError: a process died without a word, hung, or met a fault that is no ExtendError,
            and `options.restarts` are used up.
        TrainingError: the run was interrupted.
    """
    if "RANK" in os.environ or (world == 1 and not options.restarts):
        job(options, out, overwrite)
        return
    with tempfile.TemporaryDirectory(prefix="extend-train-") as directory:
        ticket = Path(directory) / "job.json"
        ticket.write_text(json.dumps({
            "options": options.model_dump(), "out": str(out), "overwrite": overwrite,
            "launcher": os.getpid(),
            "log_level": logging.getLogger("extend").getEffectiveLevel()}), encoding="utf-8")
        for left in range(options.restarts, -1, -1):
            try:
                asked = _start(world, ticket)
                break
            except RankError as error:
                if not left:
                    raise
                logger.warning("%s; starting again from the last checkpoint (%d restarts left "
                               "after this one)", error, left - 1)
                time.sleep(_PAUSE_SECONDS)
    if asked is not None:  # too late: the training is done, but not what would follow it
        os.kill(os.getpid(), asked)


def _start(world: int, ticket: Path) -> signal.Signals | None:
    """Start the processes of a job and wait for them; the signal that came meanwhile."""
    # Those that stop finish their step and save it, and some take minutes longer than others.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "900")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=world, run_id=uuid.uuid4().hex,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1)
    # Each process would otherwise start as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    elastic.setLevel(logging.CRITICAL)  # what went wrong is told below, once
    # In a thread of its own, where torch takes no signals: its handlers raise wherever the main
    # thread happens to be, and one that held a lock would hold it for ever.
    done: Future[object] = Future()
    start = elastic_launch(config, sys.executable)
    thread = threading.Thread(target=_settle, name="launcher", daemon=True, args=(
        done, lambda: start("-m", "extend.train.worker", str(ticket))))
    try:
        with _passing_on(stop_file(ticket)) as asked:
            thread.start()
            while thread.is_alive():  # a signal just before a wait without end would not end it
                thread.join(_POLL_SECONDS)
        done.result()
    except ChildFailedError as error:
        found = _first_error(error)
        ended = any(failure.exitcode == -signal.SIGTERM for failure in error.failures.values())
        if asked and ended and isinstance(found, RankError):  # it had no step to finish yet
            found = TrainingError(f"stopped by signal {asked[0].name}; the same command {_GOES_ON}")
        raise found from None
    finally:
        elastic.setLevel(level)
    return asked[0] if asked else None


def _settle(done: "Future[object]", call: Callable[[], object]) -> None:
    try:
        done.set_result(call())
    except ChildFailedError as error:
        # Its frames hold what torch started, which is to go now and not when they are collected.
        done.set_exception(error.with_traceback(None))
    except BaseException as error:
        done.set_exception(error)


def stop_file(ticket: Path) -> Path:
    """Once it is there, the processes of a job are to stop as by SIGTERM."""
    return ticket.with_name("stop")


@contextmanager
def _passing_on(stop: Path) -> Iterator[list[signal.Signals]]:
    """Yield the signals that came meanwhile; at the first one `stop` is written.

    A second signal does what it did before; those that are ignored, as under nohup, still are.
    """
    asked: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return

    def note(number: int, _: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        with contextlib.suppress(OSError):  # this may be anywhere in the main thread
            stop.parent.mkdir(exist_ok=True)
            stop.touch()
        restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    handlers = {number: handler for number in _TAKEN
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    try:
        for number in handlers:
            signal.signal(number, note)
        yield asked
    finally:
        restore()


def _first_error(error: ChildFailedError) -> ExtendError:
    """The error of the process that failed first; those after it failed for want of the first."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    known = [found for _, failure in failures if (found := _parse_error(_message(failure)))]
    # That a rank was not heard any more is what the death of another one looks like to it.
    cause = next((found for found in known if type(found) is not RankError), None)
    if cause is not None:
        return cause
    killed = [(rank, failure) for rank, failure in failures
              if failure.exitcode == -signal.SIGKILL]
    if known and not killed:
        told = str(known[0])
        return known[0] if _GOES_ON in told else RankError(f"{told}. The same command {_GOES_ON}")
    rank, failure = (killed or failures)[0]
    logger.error("%s", _traceback(failure))
    return RankError(f"process {rank} ended with exit code {failure.exitcode}: "
                     f"{_message(failure)}; the same command {_GOES_ON}")


def _message(failure: ProcessFailure) -> str:
    """What the process wrote down, beside its traceback; or what torch says of its end."""
    message: Any = failure.message
    return str(message["message"] if isinstance(message, dict) else message)


def _traceback(failure: ProcessFailure) -> str:
    """Where the process failed, as it wrote it down itself; empty when it could not."""
    message = failure.error_file_data.get("message")
    extra = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    return str(extra.get("py_callstack", ""))


def _parse_error(message: str) -> ExtendError | None:
    """Rebuild an ExtendError from the `Class: text` that the worker left."""
    name, _, text = message.partition(": ")
    kind = getattr(errors, name, None)
    return kind(text) if isinstance(kind, type) and issubclass(kind, ExtendError) else None
