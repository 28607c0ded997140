"""Ranks that share every row of an evaluation: started here, or by torchrun.

Rank 0 keeps the rows. Started here, ranks are processes of this machine, one a GPU, and the first
error of any of them ends all. Under torchrun rank 0 runs the evaluation, and when it comes to the
cells it tells the others, which wait in `follow`, what to do.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from extend import errors
from extend.console import showing_logs
from extend.errors import CompatibilityError, ExtendError, RankError, RecipeError
from extend.evaluate.backends.ring import RingBackend
from extend.evaluate.cells import Job, score_unit, score_with
from extend.evaluate.frame import Frame
from extend.evaluate.plan import Unit
from extend.ring.agreement import agree
from extend.tokenizer import load_tokenizer

TIMEOUT = timedelta(minutes=30)  # of one rank that the others wait for
_ERRORS = "ring-error-*.json"


def count_ranks(context_parallel: int, device: str) -> int:
    """Ranks that share each row: those that torchrun started, else `context_parallel`.

    Raises:
        RecipeError: another number than was started, or no number.
        CompatibilityError: more ranks than GPUs, or one GPU for all of them.
    """
    if not isinstance(context_parallel, int) or context_parallel < 1:
        raise RecipeError(f"context_parallel: {context_parallel!r} is not a number of at least 1")
    if "RANK" in os.environ:
        started = int(os.environ.get("WORLD_SIZE", 1))
        if context_parallel not in (1, started):
            raise RecipeError(f"context_parallel is {context_parallel}, but the launcher started "
                              f"{started} processes; leave it out or make the two agree")
        return started
    if context_parallel > 1 and device not in ("auto", "cpu", "cuda"):
        raise CompatibilityError(f"context_parallel is {context_parallel} and device {device!r}; "
                                 "each process takes a GPU of its own, so give device auto, cuda "
                                 "or cpu")
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if gpus and context_parallel > gpus:
        raise CompatibilityError(f"context_parallel is {context_parallel} but torch sees {gpus} "
                                 f"CUDA devices; each process needs one, so give at most {gpus}")
    return context_parallel


def is_follower() -> bool:
    """Whether a launcher started this process to `follow` another."""
    return int(os.environ.get("RANK", 0)) > 0


def follow() -> None:
    """What every process but rank 0 does under torchrun, in place of the evaluation.

    Raises:
        ExtendError: what went wrong on this rank.
    """
    with _join_launched() as rank:
        told: list[Any] = [None, None]
        dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
        _measure(told[0], told[1], rank, int(os.environ.get("LOCAL_RANK", 0)))


def score_on_ring(job: Job, units: Sequence[Unit], ranks: int) -> None:
    """Measure all units, each row spread over `ranks` processes; rows land in the store.

    Under torchrun rank 0 must call it once, also with nothing to do: the others wait for it.

    Raises:
        ExtendError: what the first failing rank raised, or that it died.
    """
    if "RANK" not in os.environ:
        if units:
            _start(job, list(units), ranks)
        return
    with _join_launched() as rank:
        dist.broadcast_object_list([job, list(units)], 0, device=torch.device("cpu"))
        _measure(job, units, rank, int(os.environ.get("LOCAL_RANK", 0)))


def _start(job: Job, units: Sequence[Unit], ranks: int) -> None:
    for path in job.rows.glob(_ERRORS):
        path.unlink()
    # The store outlives whichever rank fails, so that the others can still say who is missing.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    level = logging.getLogger("extend").getEffectiveLevel()
    multiprocessing.set_forkserver_preload(["extend.evaluate.ring_workers"])
    try:
        multiprocessing.start_processes(_work, (ranks, store.port, job, units, level),
                                        nprocs=ranks, start_method="forkserver")
    except multiprocessing.ProcessExitedException as error:
        raise _first_error(job, error, ranks) from None


def _work(rank: int, world: int, port: int, job: Job, units: Sequence[Unit], level: int) -> None:
    try:
        with showing_logs(level, rank=rank), join_local(rank, world, port, job.device):
            _measure(job, units, rank, rank)
    except Exception as error:  # of any kind: the parent tells the first one of all ranks
        known = isinstance(error, ExtendError)
        (job.rows / _ERRORS.replace("*", str(rank))).write_text(json.dumps({
            "kind": type(error).__name__, "known": known,
            "text": str(error) if known else traceback.format_exc()}), encoding="utf-8")
        sys.stderr.flush()
        os._exit(1)  # NCCL would wait, at a regular end, for ranks that now wait for this one


def _measure(job: Job, units: Sequence[Unit], rank: int, local_rank: int) -> None:
    """What all ranks do; only rank 0 keeps the rows."""
    if not units:
        return
    if job.device in ("auto", "cuda") and torch.cuda.is_available():
        job = replace(job, device=f"cuda:{local_rank}")
    local = job.open_local()
    backend = RingBackend(local.model, local.tokenizer, chunk=job.chunk)
    agree(backend.comm, "evaluation", torch=torch.__version__, dtype=str(local.model.dtype),
          weights=sum(p.numel() for p in local.model.parameters()), chunk=job.chunk)
    if rank == 0:
        score_with(backend, job, units)
        return
    frame = Frame.of(load_tokenizer(job.model), job.template, thinking=job.thinking)
    for unit in units:
        score_unit(backend, frame, unit, seed=job.seed, native_len=0, base=job.base)


@contextlib.contextmanager
def join_local(rank: int, world: int, port: int, device: str) -> Iterator[None]:
    """The group of `world` processes of this machine that meet at a store on `port`."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if sys.platform == "linux":  # a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world,
        timeout=TIMEOUT, device_id=torch.device("cuda", rank) if on_gpu else None)
    yield
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _join_launched() -> Iterator[int]:
    """The group that torchrun describes, or the one that is there; this process's rank."""
    on_gpu, ours = torch.cuda.is_available(), not dist.is_initialized()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if ours:
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT,
                                device_id=device)
    yield dist.get_rank()
    if ours:
        dist.barrier()
        dist.destroy_process_group()


def _first_error(job: Job, error: multiprocessing.ProcessExitedException,
                 ranks: int) -> ExtendError:
    """The error of the rank that failed first; others fail for want of it."""
    files = sorted(job.rows.glob(_ERRORS), key=lambda path: path.stat().st_mtime_ns)
    told = {path: json.loads(path.read_text(encoding="utf-8")) for path in files}
    for path in files:
        path.unlink()
    causes = [said for said in told.values() if said["kind"] != RankError.__name__]
    if causes:
        first = causes[0]
        kind = getattr(errors, first["kind"], ExtendError) if first["known"] else ExtendError
        return kind(first["text"] if first["known"] else
                    f"a rank of {ranks} of the evaluation failed:\n{first['text']}")
    if error.signal_name is None and told:
        return RankError(next(iter(told.values()))["text"])
    cause = error.signal_name or f"exit code {error.exit_code}"
    return RankError(f"rank {error.error_index} of {ranks} of the evaluation died ({cause}; a kill "
                     "often means that memory ran out); finished cells are kept, the same command "
                     "goes on from there")
