"""Spread the cells of an evaluation over processes, one a GPU."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import multiprocessing

from extend.console import showing_logs
from extend.errors import CompatibilityError, ExtendError
from extend.evaluate.cells import Job, score_units
from extend.evaluate.plan import Unit


def count_processes(nproc: int | str, device: str) -> int:
    """`auto` is one process a visible GPU, or one.

    Raises:
        CompatibilityError: more processes than GPUs.
    """
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if nproc == "auto":
        return max(1, gpus)
    if gpus and nproc > gpus:
        raise CompatibilityError(f"nproc is {nproc} but torch sees {gpus} CUDA devices; each "
                                 f"process needs one, so give at most {gpus}")
    return int(nproc)


def score_in_processes(job: Job, units: Sequence[Unit], nproc: int) -> None:
    """Deal the units out in turn and wait for all; every row lands in the store.

    Raises:
        ExtendError: what a process raised, or that it died.
    """
    for path in job.rows.glob("error-*.txt"):
        path.unlink()
    level = logging.getLogger("extend").getEffectiveLevel()
    # One server process imports torch and transformers, and the others are forked from it; it
    # touches no GPU, so they may.
    multiprocessing.set_forkserver_preload(["extend.evaluate.cells"])
    try:
        multiprocessing.start_processes(_work, (job, list(units), nproc, level), nprocs=nproc,
                                        start_method="forkserver")
    except multiprocessing.ProcessRaisedException as error:
        raise ExtendError(f"evaluation process {error.error_index} of {nproc} failed:\n"
                          f"{error}") from error
    except multiprocessing.ProcessExitedException as error:
        told = job.rows / f"error-{error.error_index}.txt"
        if told.is_file():
            raise ExtendError(told.read_text(encoding="utf-8")) from None
        cause = error.signal_name or f"exit code {error.exit_code}"
        raise ExtendError(f"evaluation process {error.error_index} of {nproc} died ({cause}; a "
                          "kill often means that memory ran out); finished cells are kept, the "
                          "same command goes on from there") from error


def _work(rank: int, job: Job, units: Sequence[Unit], nproc: int, level: int) -> None:
    if job.device in ("auto", "cuda") and torch.cuda.is_available():
        job = replace(job, device=f"cuda:{rank}")
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // nproc))
    try:
        with showing_logs(level, rank=rank):
            score_units(job, units[rank::nproc], rank)
    except ExtendError as error:
        # The parent prints this instead of a traceback: it is the user's to put right.
        (job.rows / f"error-{rank}.txt").write_text(str(error), encoding="utf-8")
        raise SystemExit(1) from None
