"""The `train` stage: long rows in, a long-context checkpoint out."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from extend.checkpoint import copy_side_files
from extend.curves import METRICS_NAME, PICTURE_NAME, draw_courses, read_courses
from extend.errors import CheckpointError, TrainingError
from extend.options import input_paths, local_options
from extend.output import atomic_directory, require_inputs_outside, write_json
from extend.together import failing_together
from extend.train.equality import check_equal
from extend.train.export import made_for
from extend.train.hosts import check_hosts
from extend.train.launch import count_processes, launch
from extend.train.mesh import join_processes, phase_mesh
from extend.train.progress import Progress, memory_peaks, peak_flops
from extend.train.session import Run, plan_ropes, prepare
from extend.train.state import RunState
from extend.train.step import prefetch, train_step
from extend.train.trackers import Trackers, check_trackers
from extend.train.trained import trained_parameters
from extend.train_options import TrainOptions

logger = logging.getLogger(__name__)

_FEWEST_DRAWN = 10  # steps; of fewer the numbers say as much as a picture


def train(options: TrainOptions, out: Path | str, *, nproc: int | None = None,
          overwrite: bool = False) -> Path:
    """Fine-tune a model on long rows and write it to `out`.

    Starts its own processes, or joins those of torchrun or `accelerate launch`. An interrupted run
    goes on from its last checkpoint when it is called again with the same options.

    Args:
        options: what to train, on what, and how.
        out: directory to create; `<out>.state` beside it holds checkpoints until the run is done.
        nproc: processes; overrides `options.nproc`.
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        LayoutError: a length that does not divide over the processes.
        RecipeError: a RoPE method or a `trainable` expression that does not fit the model.
        DataError: text that is missing, malformed or too short.
        CheckpointError: the model cannot be read or `out` cannot be written.
        CompatibilityError: a model that cannot be trained this way.
        TrainingError: the loss is not finite, the run was interrupted, hosts differ in what they
            see, `<out>.state` belongs to a run with other settings, or the processes do not divide
            as the options say.
        RankError: another process is gone without a word.
        SystemExit: another process of the same launch has failed and tells its error.
    """
    out = Path(out).absolute()
    with failing_together():
        options = local_options(options)
        world = count_processes(options.nproc if nproc is None else nproc)
        require_inputs_outside(out, _inputs(options))
        plan_ropes(options, world)
        if int(os.environ.get("RANK", 0)) == 0:  # the main process alone tells them
            check_trackers(options.trackers)
        if out.exists() and not overwrite:
            raise CheckpointError(f"{out}: exists already; give another --out, or --overwrite to "
                                  "replace it")
        launch(run_process, options, out, overwrite=overwrite, world=world)
    return out


def _inputs(options: TrainOptions) -> dict[str, str]:
    return {".".join(map(str, location)): path for location, path in input_paths(options)}


def run_process(options: TrainOptions, out: Path, overwrite: bool) -> None:
    """What each process of a run does."""
    with join_processes(options) as processes, RunState(
            out, processes, keep=options.keep_checkpoints,
            background=options.save_in_background) as state:
        check_hosts(_inputs(options), out, processes)
        run = prepare(options, state)
        with stop_signals() as stopped:
            run_schedule(run, out, stopped)
        write_output(run, out, overwrite)
        processes.barrier()
    if stopped.number is not None and "RANK" not in os.environ:
        os.kill(os.getpid(), stopped.number)  # too late for the training, not for what follows it


class Stop(threading.Event):
    """Whether a signal has asked to stop, and the `number` of that signal."""

    number: int | None = None

    def ask(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.set()


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Yield an event that SIGTERM and SIGINT set, so that a step can be finished and saved."""
    stopped = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main thread may handle signals
        return
    old = {number: signal.signal(number, stopped.ask)
           for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run_schedule(run: Run, out: Path, stopped: threading.Event) -> None:
    """All phases, from the step after the last checkpoint."""
    done = 0
    with _open_progress(run, out) if run.processes.is_main else nullcontext() as progress:
        for number, phase in enumerate(run.options.schedule):
            begin = min(max(0, run.first_step - done), phase.num_steps)
            if begin < phase.num_steps:
                run_phase(run, number, begin, done, progress, stopped)
            done += phase.num_steps


def run_phase(run: Run, number: int, begin: int, done: int, progress: Progress | None,
              stopped: threading.Event) -> None:
    """The steps of one phase from `begin` on; `done` steps lie in the phases before.

    Raises:
        TrainingError: a signal asked to stop; the step in hand is finished and saved.
    """
    phase, total = run.options.schedule[number], _total_steps(run)
    mesh = phase_mesh(phase, run.processes)
    run.set_phase_rope(number)
    with prefetch(run, number, mesh, begin) as batches:
        for local_step in range(begin, phase.num_steps):
            asked = time.monotonic()
            work = next(batches)
            waited = time.monotonic() - asked
            metrics, flops, stop = train_step(run, number, mesh, local_step, work, stopped)
            metrics |= {"wait_seconds": round(waited, 4)} | memory_peaks(run.processes)
            step = done + local_step + 1
            if progress is not None:
                progress.tell({"step": step, "steps": total} | metrics, flops=flops,
                              tokens=phase.batch_rows * phase.length, peak=_peak(run))
            if stop or step % run.options.save_every == 0 or step == total:
                check_equal(trained_parameters(run.module), run.processes)
                run.state.save(step, run.module, run.optimizer)
                if progress is not None:
                    progress.pause()
            if stop or step == total:
                run.state.finish()
            if stop and step < total:
                raise TrainingError(f"stopped by a signal after step {step} of {total}; it is "
                                    f"saved in {run.state.directory}, and the same command goes "
                                    "on from there")


def _total_steps(run: Run) -> int:
    return sum(phase.num_steps for phase in run.options.schedule)


def _open_progress(run: Run, out: Path) -> Progress:
    left, done, total = run.first_step, 0, 0
    for phase in run.options.schedule:
        steps = min(left, phase.num_steps)
        done += steps * phase.batch_rows * phase.length
        total += phase.num_steps * phase.batch_rows * phase.length
        left -= steps
    trackers = Trackers(run.options, out, run.state.directory, run.first_step)
    return Progress(run.state.metrics_file, step=run.first_step, total_tokens=total,
                    done_tokens=done, world=run.processes.world, trackers=trackers)


def _peak(run: Run) -> float | None:
    """FLOP/s that all devices together could give, if known."""
    peak = peak_flops(run.processes.device)
    return None if peak is None else peak * run.processes.world


def write_output(run: Run, out: Path, overwrite: bool) -> None:
    """Write the checkpoint, its metrics and its manifest; then the working directory goes."""
    if not run.processes.is_main:
        run.exporter.write(out, run.processes)
        return
    with atomic_directory(out, overwrite=overwrite, inputs=_inputs(run.options)) as partial:
        run.exporter.write(partial, run.processes)
        max_len = made_for(run.options.schedule, run.config)
        write_json(partial / "config.json", run.exporter.config(run.config, run.ropes[-1], max_len))
        copy_side_files(Path(run.options.model), partial, max_len=max_len)
        shutil.copyfile(run.state.metrics_file, partial / METRICS_NAME)
        if _total_steps(run) >= _FEWEST_DRAWN:
            draw_courses(read_courses(partial), partial / PICTURE_NAME)
        run.manifest.write(partial, **_results(run, max_len))
    run.state.remove()
    logger.info("wrote %s", out)


def _results(run: Run, max_len: int) -> dict[str, Any]:
    lines = run.state.metrics_file.read_text(encoding="utf-8").splitlines()
    return {"processes": run.processes.world, "metrics": json.loads(lines[-1]),
            "rope_before": run.config.rope.to_json(), "rope_after": run.ropes[-1].to_json(),
            "max_position_embeddings": max_len}
