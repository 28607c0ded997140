"""Resumable checkpoints of a run: `<out>.state/step-N` and what the run was started with.

A checkpoint is written under a temporary name and renamed when complete; the one before it goes
only then. Data order, learning rate and adapters follow from the options and the step, so weights,
optimizer moments and the step are all there is to remember.
"""

import contextlib
import fcntl
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from extend.errors import CheckpointError, TrainingError
from extend.model_config import read_json
from extend.output import remove_directory, require_space, write_json
from extend.train.mesh import Processes
from extend.train.optim import create_state

logger = logging.getLogger(__name__)

_FINGERPRINT = "run.json"
_LOCK = "lock"
_PREFIX = "step-"


class RunState:
    """The working directory of a run; a context, in which no other run may use it."""

    def __init__(self, out: Path, processes: Processes):
        self.directory = out.with_name(out.name + ".state")
        self.processes = processes
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunState":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def metrics_file(self) -> Path:
        return self.directory / "metrics.jsonl"

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raise TrainingError when the directory holds steps of a run with another `fingerprint`.

        The message names what differs. Without a checkpoint there is nothing to lose.
        """
        known = self.directory / _FINGERPRINT
        if not known.is_file() or not self.last_step():
            return
        changed = _differences(read_json(known), fingerprint)
        if changed:
            raise TrainingError(
                f"{self.directory}: holds an unfinished run with other settings: "
                f"{'; '.join(changed)}. Put them back to go on with it, delete the directory to "
                "start afresh, or choose another --out")

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Create the directory and lock it; call it in the main process only.

        Raises:
            TrainingError: another run is at work in it.
            CheckpointError: it cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_json(self.directory / _FINGERPRINT, fingerprint)
        except BlockingIOError:
            raise TrainingError(f"{self.directory}: another run is at work in it; wait for its "
                                "end, or stop it") from None
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be written "
                                  f"({error.strerror})") from None

    def last_step(self) -> int:
        """The step of the newest complete checkpoint, or 0."""
        steps = [int(p.name.removeprefix(_PREFIX)) for p in self.directory.glob(f"{_PREFIX}*")
                 if (p / ".metadata").is_file()]
        return max(steps, default=0)

    def save(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint after `step` steps; all processes call it."""
        final = self.directory / f"{_PREFIX}{step}"
        partial = self.directory / f".{_PREFIX}{step}.partial"
        tensors = _tensors(module, optimizer)
        if self.processes.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            require_space(self.directory, _count_bytes(tensors))
        self.processes.barrier()
        try:
            with self._quiet():
                dcp.save(tensors, checkpoint_id=partial, no_dist=self.processes.mesh is None)
        except (OSError, dcp.api.CheckpointException) as error:
            if self.processes.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"{partial}: the training state cannot be written "
                                  f"({_cause(error)}); see that the disk is not full, and the same "
                                  "command goes on from the checkpoint before") from None
        if self.processes.is_main:
            older = [p for p in self.directory.glob(f"{_PREFIX}*") if p != final]
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for path in older:
                shutil.rmtree(path)
            logger.info("saved step %d in %s", step, self.directory)
        self.processes.barrier()

    def load(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the checkpoint of `step` into the module and the optimizer, in place.

        Raises:
            CheckpointError: it is damaged.
        """
        path = self.directory / f"{_PREFIX}{step}"
        try:
            with self._quiet():
                dcp.load(_tensors(module, optimizer), checkpoint_id=path,
                         no_dist=self.processes.mesh is None)
        except (OSError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
            raise CheckpointError(f"{path}: the training state cannot be read ({_cause(error)}); "
                                  f"delete {self.directory} to start afresh") from None

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Hide torch's warning that there is one process: that is meant."""
        with warnings.catch_warnings():
            if self.processes.mesh is None:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield

    def remove(self) -> None:
        """Delete the directory; the run is done."""
        remove_directory(self.directory)


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


def _cause(error: BaseException) -> str:
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
