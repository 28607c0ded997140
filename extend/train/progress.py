"""What a run tells about each step: one line for people, one JSON line for machines, trackers."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from extend.console import progress
from extend.errors import CheckpointError
from extend.manifest import host_peak
from extend.train.mesh import Processes
from extend.train.trackers import Trackers

logger = logging.getLogger(__name__)

# Dense bf16 FLOP/s by the start of the device's name (data sheets of the vendors).
PEAK_FLOPS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA GH200": 989e12,
              "NVIDIA H800": 989e12, "NVIDIA B200": 2250e12, "NVIDIA A100": 312e12,
              "NVIDIA A800": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12}


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of one device; None when it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    longest_first = sorted(PEAK_FLOPS, key=len, reverse=True)
    return next((PEAK_FLOPS[key] for key in longest_first if name.startswith(key)), None)


def memory_peaks(processes: Processes) -> dict[str, int]:
    """Peak memory so far; all processes call it.

    Returns:
        `peak_memory_bytes`: allocated on the GPU of the process that has most, or on the CPU its
        whole memory. `host_memory_bytes`: of all processes of the host that has most.
    """
    own_host = host_peak()
    device = processes.device
    own = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else own_host
    peaks = torch.tensor([[own, own_host]], device=device)
    if processes.mesh is not None:
        peaks = processes.gather(peaks)
    most, hosts = peaks[:, 0].max().item(), peaks[:, 1].split(processes.local_world)
    return {"peak_memory_bytes": int(most),
            "host_memory_bytes": max(int(host.sum()) for host in hosts)}


def _unwritable(file: Path | str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file}: cannot be written ({error.strerror}); free space, and the "
                           "same command goes on from the last checkpoint")


class Progress:
    """Writes metrics.jsonl and the progress line; only in the main process.

    Args:
        file: metrics.jsonl; lines after `step` are dropped, so a resumed run leaves one per step.
        step: steps done before.
        total_tokens: of the whole run.
        done_tokens: of the steps done before.
        world: processes, each with a GPU of its own where there are any.
        trackers: told of each step too, and closed at the end.
    """

    def __init__(self, file: Path, *, step: int, total_tokens: int, done_tokens: int,
                 world: int = 1, trackers: Trackers | None = None):
        self._world, self._trackers = world, trackers
        try:
            _truncate(file, step)
            self._file = file.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(file, error) from None
        self._total, self._done = total_tokens, done_tokens
        self._seconds, self._tokens = 0.0, 0
        self._last = time.monotonic()

    def tell(self, record: dict[str, Any], *, tokens: int, flops: float,
             peak: float | None) -> None:
        """Add speed to the `record` of a step, write it down and log it.

        Args:
            tokens: of this step, over all processes.
            flops: of this step.
            peak: FLOP/s of all processes together, if known.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._done += tokens
        self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        record |= {"tokens": self._done, "seconds": round(seconds, 4),
                   "tokens_per_second": round(tokens / seconds, 1),
                   "tokens_per_second_per_gpu": round(tokens / seconds / self._world, 1)}
        if peak is not None:
            record["mfu"] = round(flops / seconds / peak, 4)
        record["eta_seconds"] = round((self._total - self._done) * self._seconds / self._tokens, 1)
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._file.name, error) from None
        logger.info("%s", progress_line(record), extra=progress(record["step"], record["steps"]))
        if self._trackers is not None:
            self._trackers.log(record)

    def pause(self) -> None:
        """Leave the time since the last step (writing a checkpoint) out of the speed."""
        self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def progress_line(record: dict[str, Any]) -> str:
    """One line of text for a record of metrics.jsonl."""
    parts = [f"step {record['step']}/{record['steps']}", f"phase {record['phase']}",
             f"loss {_told(record['loss'], 4)}", f"nll {_told(record['nll'], 4)}"]
    if record.get("divergence") is not None:
        parts.append(f"divergence {record['divergence']:.4f}")
    if record["answer_nll"] is not None:
        parts.append(f"answers {record['answer_nll']:.4f}")
    if "skipped" in record:
        parts.append("skipped")
    parts += [f"lr {record['lr']:.2e}", f"grad {_told(record['grad_norm'], 3)}",
              f"{record['tokens_per_second']:,.0f} tok/s"]
    if record["tokens_per_second_per_gpu"] != record["tokens_per_second"]:
        parts.append(f"{record['tokens_per_second_per_gpu']:,.0f} each")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    eta = math.ceil(record["eta_seconds"])
    parts += [f"{record['peak_memory_bytes'] / 2**30:.1f} GiB",
              f"host {record['host_memory_bytes'] / 2**30:.1f} GiB",
              f"ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"]
    return " | ".join(parts)


def _told(value: float | None, digits: int) -> str:
    """None stands for a number that is not finite, in a step that was skipped."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def _truncate(file: Path, step: int) -> None:
    """Keep the lines of the steps up to `step`; a line cut off by a crash is none of them."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    file.write_text("".join(kept), encoding="utf-8")
