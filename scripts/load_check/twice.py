"""Two at once in one output: while one works, the other is refused, for every kind of stage.

The first is a process that holds the output as every stage does; it is stopped only after the
second has been refused, killed, and must then be in nobody's way.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_model import save_text, save_tiny_model

from load_check.record import Stopwatch, environment

HOLD = """
import sys, time
from extend.lock import holding
with holding(sys.argv[1], inside=sys.argv[2] == "run"):
    print("held", flush=True)
    time.sleep(600)
"""
RECIPE = """\
name: twice
stages:
  - name: {name}
    stage: train
    model: base
    nproc: 1
    loss_chunk: 64
    schedule: [{{length: 64, steps: 1, batch_rows: 1, lr: 1e-4}}]
    data: [{{kind: text, path: text.jsonl}}]
"""


def commands(work: Path) -> dict[str, list[str]]:
    """Kind -> arguments of `extend` that write OUT; inputs lie in `work`."""
    base, tuned, adapter = (str(work / name) for name in ("base", "tuned", "adapter"))
    return {
        "rescale": ["rescale", base, "--to", "128", "--method", "ntk"],
        "train": ["train", str(work / "recipe.yaml")],
        "extract": ["extract", "--base", base, "--tuned", tuned, "--rank", "2"],
        "merge": ["merge", "--adapter", adapter, "--target", base],
        "eval": ["eval", base, "--tasks", "passkey", "--lengths", "320", "--depths", "1",
                 "--trials", "1"],
        "cut": ["cut", "--adapter", adapter, "--rank", "1"],
        "run": ["run", str(work / "recipe.yaml")]}


def check(work: Path) -> tuple[dict[str, Any], list[str]]:
    save_tiny_model(work / "base", "llama", native_len=64, rope_theta=1e4)
    save_tiny_model(work / "tuned", "llama", native_len=64, rope_theta=1e4,
                    drift_from=work / "base")
    save_text(work / "text.jsonl", documents=60, lines=8)
    (work / "recipe.yaml").write_text(RECIPE.format(name="long"), encoding="utf-8")
    figures: dict[str, Any] = {}
    failures: list[str] = []
    _extend(["extract", "--base", str(work / "base"), "--tuned", str(work / "tuned"), "--rank",
             "2", "--out", str(work / "adapter")], work)
    for kind, arguments in commands(work).items():
        figures[kind] = _refused_then_done(kind, arguments, work, failures)
    return figures, failures


def _refused_then_done(kind: str, arguments: list[str], work: Path, failures: list[str]) -> str:
    out = work / f"out-{kind}"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out), kind], text=True,
                              stdout=subprocess.PIPE, env=environment())
    holder.stdout.readline()
    watch = Stopwatch()
    second = _extend([*arguments, "--out", str(out)], work)
    seconds = watch.seconds()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    message = (second.stderr.strip().splitlines() or [""])[-1]
    if second.returncode != 1 or not all(words in message for words in (
            f"process {holder.pid} ", ", begun 20", "is at work on it; wait for its end")):
        failures.append(f"{kind}: exit code {second.returncode}, {message}")
    after = _extend([*arguments, "--out", str(out)], work)
    if after.returncode != 0:
        failures.append(f"{kind}, after the first was killed: {after.stderr[-500:]}")
    if out.with_name(f".{out.name}.lock").exists() or (out / ".run.lock").exists():
        failures.append(f"{kind}: a lock is left behind")
    return f"refused after {seconds} s; done once the first was killed"


def _extend(arguments: list[str], work: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "extend", *arguments], capture_output=True,
                          text=True, env=environment(EXTEND_CACHE=str(work / "cache")))
