"""A training of many tiny steps: memory flat, logs bounded, page drawn."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tiny_model import save_text, save_tiny_model

from load_check.record import Stopwatch, environment, resident_bytes

MOST_GROWTH = 0.05
"""Of resident memory from the second tenth of the steps to the last, as a share."""
MOST_PAGE_BYTES = 2_000_000

RECIPE = """\
name: many steps
seed: 1
stages:
  - name: long
    stage: train
    model: base
    nproc: 1
    save_every: {every}
    loss_chunk: 64
    schedule:
      - {{length: 64, steps: {steps}, batch_rows: 1, lr: 1e-4}}
    data:
      - {{kind: text, path: text.jsonl}}
"""


def check(work: Path, steps: int) -> tuple[dict[str, Any], list[str]]:
    """Run a recipe with so many steps and watch its process."""
    save_tiny_model(work / "base", "llama", native_len=64, rope_theta=1e4)
    save_text(work / "text.jsonl", documents=200, lines=8)
    every = max(1, steps // 10)
    (work / "recipe.yaml").write_text(RECIPE.format(steps=steps, every=every), encoding="utf-8")
    watch, log = Stopwatch(), work / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "extend", "run", str(work / "recipe.yaml"), "--out",
             str(work / "out")], stdout=file, stderr=file,
            env=environment(EXTEND_CACHE=str(work / "cache")))
    resident = _watch(process, work / "out" / "long.state" / "metrics.jsonl", every)
    seconds = watch.seconds()
    return judge(work, steps, process.returncode, resident, seconds)


def _watch(process: subprocess.Popen, metrics: Path, every: int) -> dict[int, int]:
    """Step -> resident bytes, at every so-many-th."""
    resident: dict[int, int] = {}
    done, position = 0, 0
    while process.poll() is None:
        try:
            with metrics.open("rb") as file:
                file.seek(position)
                new = file.read()
            position, done = position + len(new), done + new.count(b"\n")
        except OSError:
            pass  # not begun yet, or over
        if done // every > len(resident):
            resident[done // every * every] = resident_bytes(process.pid)
        time.sleep(0.05)
    return resident


def judge(work: Path, steps: int, code: int, resident: dict[int, int],
          seconds: float) -> tuple[dict[str, Any], list[str]]:
    log = work / "log.txt"
    if code != 0:
        return {"exit code": code}, [log.read_text(errors="replace")[-2000:]]
    out = work / "out"
    metrics = out / "long" / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines()
    page = (out / "index.html").read_text(encoding="utf-8")
    figures = {
        "steps": steps, "seconds": seconds, "steps a second": round(steps / seconds, 1),
        "resident MB by step": {str(step): round(size / 1e6, 1)
                                for step, size in resident.items()},
        "metrics.jsonl, bytes a step": metrics.stat().st_size // max(1, len(lines)),
        "log, bytes": log.stat().st_size, "page, bytes": len(page.encode()),
        "training.png, bytes": (out / "long" / "training.png").stat().st_size}
    failures = []
    if [json.loads(line)["step"] for line in lines] != list(range(1, steps + 1)):
        failures.append(f"{metrics} does not have one line a step")
    sizes = [size for size in resident.values() if size]
    if len(sizes) < 3:
        failures.append("memory was seen at fewer than three steps")
    else:
        growth = sizes[-1] / sizes[1] - 1
        figures["growth of resident memory after the second tenth"] = round(growth, 4)
        if growth > MOST_GROWTH:
            failures.append(f"resident memory grew by {growth:.1%}, more than {MOST_GROWTH:.0%}")
    if "<svg" not in page or len(page) > MOST_PAGE_BYTES:
        failures.append(f"the page has no chart, or {len(page):,} bytes")
    if log.stat().st_size > 200_000:
        failures.append(f"the log has {log.stat().st_size:,} bytes")
    return figures, failures
