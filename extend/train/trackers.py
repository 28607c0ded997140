"""Experiment trackers, through accelerate's classes; metrics.jsonl holds the same without them.

A tracker is told of every step, in the main process only. One that fails is told once and left out
from then on: it is never a reason to end a run.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from extend.errors import CompatibilityError
from extend.model_config import read_json
from extend.output import write_json
from extend.train_options import TrainOptions

logger = logging.getLogger(__name__)

_IDENTITY = "trackers.json"
_FINISH_SECONDS = 60.0  # to send what is still on its way
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


class Tracked(NamedTuple):
    """A run as trackers know it.

    Attributes:
        project, name: as the recipe gives them, or of the output's directory.
        identity: the same for all parts of an interrupted run, and for no other run.
        directory: for trackers that write files.
        first_step: steps that were done, and tracked, before.
    """

    project: str
    name: str
    identity: str
    directory: Path
    first_step: int


def _tensorboard(run: Tracked) -> Any:
    """Steps that an interrupted run had done after its last checkpoint are taken back."""
    from accelerate.tracking import TensorBoardTracker

    again = {"purge_step": run.first_step + 1} if run.first_step else {}
    return TensorBoardTracker(run.name, logging_dir=run.directory, **again)


def _wandb(run: Tracked) -> Any:
    from accelerate.tracking import WandBTracker

    return WandBTracker(run.project, name=run.name, id=run.identity, resume="allow",
                        save_code=False)


def _trackio(run: Tracked) -> Any:
    """Runs of one name are one run to it."""
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(run.project, name=run.name, resume="allow" if run.first_step else "never")


def check_trackers(names: list[str]) -> None:
    """Raise CompatibilityError for a tracker whose packages are not installed."""
    for name in names:
        for package in ("accelerate", name):
            if importlib.util.find_spec(package) is None:
                raise CompatibilityError(
                    f"trackers: {name} needs the package {package}, which is not installed; pip "
                    f"install 'extend-context[trackers]', or leave {name} out")


class Trackers:
    """The trackers of a run; use it in the main process only.

    Args:
        out: directory of the run's output; TensorBoard's files lie in `tensorboard/` beside it.
        state: directory that an interrupted run finds again.
        first_step: steps done before.
    """

    def __init__(self, options: TrainOptions, out: Path, state: Path, first_step: int):
        self._running: dict[str, Any] = {}
        if not options.trackers:
            return
        run = Tracked(options.project or out.parent.name or "extend", options.run_name or out.name,
                      _identity(state, first_step), out.parent / "tensorboard", first_step)
        for name in options.trackers:
            self._attempt(name, "start", lambda name=name: self._start(name, run, options))

    def _start(self, name: str, run: Tracked, options: TrainOptions) -> None:
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it whether this is the main process
        tracker = TRACKERS[name](run)
        tracker.start()
        self._running[name] = tracker
        if not run.first_step:
            tracker.store_init_configuration(_settings(options))

    def log(self, record: dict[str, Any]) -> None:
        """Tell of a step: every number of its line in metrics.jsonl."""
        values = {key: value for key, value in record.items()
                  if isinstance(value, int | float) and key not in ("step", "steps")}
        for name, tracker in list(self._running.items()):
            self._attempt(name, f"step {record['step']}",
                          lambda tracker=tracker: tracker.log(values, step=record["step"]))

    def close(self) -> None:
        """Let them send what they hold; one that takes too long is left behind."""
        for name, tracker in list(self._running.items()):
            self._attempt(name, "end", lambda tracker=tracker: _finish(tracker))
        self._running.clear()

    def _attempt(self, name: str, when: str, action: Callable[[], None]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                action()
        except (Exception, SystemExit) as error:  # whatever a service's client may raise
            self._running.pop(name, None)
            lost = "what it had not sent yet is" if when == "end" else "the rest of the run is"
            logger.warning("tracker %s failed at the %s (%s: %s); %s missing there and complete in "
                           "metrics.jsonl", name, when, type(error).__name__,
                           _without_secrets(error), lost)


def _identity(state: Path, first_step: int) -> str:
    """Kept beside the checkpoints; a run that starts afresh has a new one."""
    known = state / _IDENTITY
    if not first_step or not known.is_file():
        write_json(known, {"identity": uuid.uuid4().hex})
    return read_json(known)["identity"]


def _settings(options: TrainOptions) -> dict[str, Any]:
    """The options as plain values."""
    return {key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in options.model_dump(mode="json").items()}


def _finish(tracker: Any) -> None:
    """Raises what `finish` raises, or TimeoutError; a client that waits for a network for ever
    must not keep the run from ending."""
    failed: list[BaseException] = []

    def finish() -> None:
        try:
            tracker.finish()
        except (Exception, SystemExit) as error:
            failed.append(error)

    thread = threading.Thread(target=finish, name="finish-tracker", daemon=True)
    thread.start()
    thread.join(_FINISH_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"it did not finish within {_FINISH_SECONDS:g} s")
    if failed:
        raise failed[0]


def _without_secrets(error: BaseException) -> str:
    """The first line of an error, without the value of any variable that is named as a secret."""
    text = (str(error).strip().splitlines() or [""])[0]
    for name, value in os.environ.items():
        if len(value) >= 4 and any(part in name.upper() for part in _SECRETS):
            text = text.replace(value, "***")
    return text


TRACKERS: dict[str, Callable[[Tracked], Any]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
