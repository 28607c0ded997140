"""Resumable checkpoints of a run: `<out>.state/step-N` and what the run was started with.

A checkpoint is written under a temporary name and renamed when complete; older ones go only then.
Data order, learning rate and adapters follow from the options and the step, so weights, optimizer
moments and the step are all there is to remember. None of it depends on how many processes there
are: a run may go on with others, which read their shards out of those that were written.
"""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from extend.curves import METRICS_NAME
from extend.errors import CheckpointError, TrainingError
from extend.lock import holding
from extend.model_config import read_json
from extend.output import remove_directory, remove_leftover, require_space, write_json
from extend.train.background import BackgroundWriter
from extend.train.mesh import Processes
from extend.train.optim import create_state
from extend.train.sound import find_damage, write_hashes

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
_PREFIX = "step-"
_DECISIVE = ("options", "inputs")  # of the fingerprint: what must not change between steps


class RunState:
    """The working directory of a run; a context, in which no other process may write `out`.

    Args:
        out: what the run writes in the end; the directory lies beside it.
        keep: checkpoints that stay.
        background: a checkpoint is copied to the host's memory, and written while training goes on.
    """

    def __init__(self, out: Path, processes: Processes, *, keep: int = 1, background: bool = False):
        self.directory = out.with_name(out.name + ".state")
        self.processes = processes
        self.keep = keep
        self._lock = holding(out) if processes.is_main else contextlib.nullcontext()
        self._background = BackgroundWriter(processes) if background else None

    def __enter__(self) -> "RunState":
        self._lock.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._background is not None:
                self._background.close()
        finally:
            self._lock.__exit__(None, None, None)

    @property
    def metrics_file(self) -> Path:
        return self.directory / METRICS_NAME

    def metrics_lines(self) -> list[str]:
        """What was told of the steps so far, a line each."""
        file = self.metrics_file
        return file.read_text(encoding="utf-8").splitlines(True) if file.is_file() else []

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raise TrainingError when the directory holds steps of a run with another `fingerprint`.

        The message names what differs. Without a checkpoint there is nothing to lose. Another
        number of processes is told, and accepted.
        """
        known = self.directory / RUN_FILE
        if not known.is_file() or not self.last_step():
            return
        old = read_json(known)
        changed = _differences(*({key: record.get(key) for key in _DECISIVE}
                                 for record in (old, fingerprint)))
        if changed:
            raise TrainingError(
                f"{self.directory}: holds an unfinished run with other settings: "
                f"{'; '.join(changed)}. Put them back to go on with it, delete the directory to "
                "start afresh, or choose another --out")
        if old.get("processes") != fingerprint.get("processes"):
            logger.info("%s: going on with %s processes; the steps before ran on %s",
                        self.directory, fingerprint.get("processes"), old.get("processes"))

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Create the directory; call it in the main process only.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / RUN_FILE, fingerprint)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be written "
                                  f"({error.strerror})") from None

    def last_step(self) -> int:
        """The step of the newest complete checkpoint, or 0."""
        return max(saved_steps(self.directory), default=0)

    def save(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint after `step` steps, or begin to; all processes call it.

        Raises:
            CheckpointError: it cannot be written, or the one before, in the background, could not.
        """
        self.finish()
        partial = self.directory / f".{_PREFIX}{step}.partial"
        tensors = _tensors(module, optimizer)
        if self.processes.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            require_space(self.directory, _count_bytes(tensors))
        self.processes.barrier()
        if self._background is not None:
            group = self._background.group
            self._background.begin(tensors, partial, lambda: self._keep(step, group))
            return
        with self._telling(partial), quiet_alone():
            dcp.save(tensors, checkpoint_id=partial, no_dist=self.processes.mesh is None)
            self._keep(step)
        self.processes.barrier()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._background is not None and self._background.partial is not None:
            with self._telling(self._background.partial):
                self._background.wait()

    @contextlib.contextmanager
    def _telling(self, partial: Path) -> Iterator[None]:
        """Turn a failure to write `partial` into an error of ours, and leave nothing of it."""
        try:
            yield
        except (OSError, dcp.api.CheckpointException) as error:
            if self.processes.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"{partial}: the training state cannot be written "
                                  f"({describe_cause(error)}); see that the disk is not full, and "
                                  "the same command goes on from the checkpoint before") from None

    def _keep(self, step: int, group: dist.ProcessGroup | None = None) -> None:
        """Give the complete checkpoint of `step` its name, and delete those that are too old."""
        partial = self.directory / f".{_PREFIX}{step}.partial"
        write_hashes(partial, self.processes, group)
        if not self.processes.is_main:
            return
        final = step_directory(self.directory, step)
        remove_directory(final)
        partial.rename(final)
        for old in sorted(saved_steps(self.directory))[:-self.keep]:
            remove_directory(step_directory(self.directory, old))
        logger.info("saved step %d in %s", step, self.directory)

    def load_newest(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that is whole, and return its step; 0 where there is none.

        One that is not is told of and set aside.

        Raises:
            CheckpointError: none of those that are there is whole.
        """
        while step := self.processes.share(self.last_step()):
            path = step_directory(self.directory, step)
            damage = find_damage(path, self.processes)
            if damage is None:
                self.load(step, module, optimizer)
                return step
            before = self.processes.share(max(set(saved_steps(self.directory)) - {step}, default=0))
            if not before:
                raise CheckpointError(
                    f"{path}: the training state is damaged: {damage}. There is none before it; "
                    f"delete {self.directory} to start afresh (keep_checkpoints 2 keeps one more)")
            if self.processes.is_main:
                logger.warning("%s: the training state is damaged: %s; it is set aside, and the "
                               "run goes on after step %d", path, damage, before)
                aside = path.with_name(f".{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            self.processes.barrier()
        return 0

    def load(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the checkpoint of `step` into the module and the optimizer, in place.

        Raises:
            CheckpointError: it is damaged.
        """
        path = step_directory(self.directory, step)
        try:
            with quiet_alone():
                dcp.load(_tensors(module, optimizer), checkpoint_id=path,
                         no_dist=self.processes.mesh is None)
        except (OSError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
            raise CheckpointError(f"{path}: the training state cannot be read "
                                  f"({describe_cause(error)}); delete {self.directory} to start "
                                  "afresh") from None

    def remove(self) -> None:
        """Delete the directory; the run is done."""
        remove_leftover(self.directory)


def saved_steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in the working directory of a run."""
    return [int(p.name.removeprefix(_PREFIX)) for p in directory.glob(f"{_PREFIX}*")
            if (p / ".metadata").is_file()]


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return directory / f"{_PREFIX}{step}"


@contextlib.contextmanager
def quiet_alone() -> Iterator[None]:
    """Hide torch's warning that there is one process: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every tensor that a step changes, by name; loading writes into these very tensors."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    create_state(optimizer)
    return {"model": {name: p.detach() for name, p in trained.items()},
            "optimizer": {name: optimizer.state[p] for name, p in trained.items()}}


def _count_bytes(tensors: dict[str, Any]) -> int:
    """Bytes of all tensors, whole ones where a process holds a shard."""
    return sum(_count_bytes(value) if isinstance(value, dict)
               else value.numel() * value.element_size() for value in tensors.values())


def describe_cause(error: BaseException) -> str:
    """What went wrong, without the traceback of every process that torch puts around it."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip()


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`key: was A, is B` for every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys
                for line in _differences(old.get(key), new.get(key), f"{where}.{key}".strip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True))
                for line in _differences(*pair, f"{where}[{i}]")]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]
