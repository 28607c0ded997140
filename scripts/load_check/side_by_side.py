"""Many runs at once, each in its own directory, with one token cache, Hub cache and inputs."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_model import save_text, save_tiny_model

from load_check.record import Stopwatch, environment

RECIPE = """\
name: side by side
seed: 1
stages:
  - {name: rescaled, stage: rescale, model: base, to: 128, method: ntk}
  - name: long
    stage: train
    model: rescaled
    nproc: 1
    save_every: 2
    loss_chunk: 64
    schedule: [{length: 128, steps: 4, batch_rows: 1, lr: 3e-3}]
    data: [{kind: text, path: text.jsonl}]
  - {name: adapter, stage: extract, base: base, tuned: long, rank: 4}
  - {name: merged, stage: merge, adapter: adapter, target: base}
  - {name: scores, stage: eval, model: merged, tasks: [passkey], lengths: [320], depths: 2,
     trials: 1}
"""
STAGES = ("rescaled", "long", "adapter", "merged", "scores")
TIMED = ("metrics.jsonl", "training.png", "results.json")
"""Of the outputs, those in which times stand; of results.json the rows are compared."""


def check(work: Path, runs: int) -> tuple[dict[str, Any], list[str]]:
    """One alone with caches of its own, then `runs` at once with shared ones, which begin empty."""
    save_tiny_model(work / "base", "llama", native_len=64, rope_theta=1e4)
    save_text(work / "text.jsonl", documents=400, lines=8)
    (work / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    watch = Stopwatch()
    failures = [f"alone: {_wait(_start(work, 'alone', 'alone-cache'))}"]
    alone, failures = watch.seconds(), [f for f in failures if f != "alone: "]
    if failures:
        return {}, failures
    watch = Stopwatch()
    running = {f"run-{i}": _start(work, f"run-{i}", "shared-cache") for i in range(runs)}
    for name, process in running.items():
        problem = _wait(process)
        if problem:
            failures.append(f"{name}: {problem}")
    together, expected = watch.seconds(), _content(work / "alone")
    for name in running:
        found = _content(work / name) if (work / name / "scores").is_dir() else {}
        failures += [f"{name}: {key} is not as in a run alone"
                     for key in expected if found.get(key) != expected[key]]
    entries = list((work / "shared-cache" / "tokens").glob("[!.]*/meta.json"))
    if len(entries) != 1:
        failures.append(f"the token cache has {len(entries)} entries, not 1")
    return {"runs": runs, "one alone, seconds": alone, "all at once, seconds": together,
            "outputs compared in each": len(expected), "entries of the token cache": len(entries)
            }, failures


def _start(work: Path, name: str, cache: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "extend", "run", str(work / "recipe.yaml"), "--out",
         str(work / name)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment(EXTEND_CACHE=str(work / cache), HF_HOME=str(work / cache / "hub")))


def _wait(process: subprocess.Popen) -> str:
    _, said = process.communicate()
    return "" if process.returncode == 0 else said[-1000:]


def _hash(path: Path, run: Path) -> str:
    """Of a file, with the run's own directory called RUN."""
    return hashlib.sha256(path.read_bytes().replace(str(run).encode(), b"RUN")).hexdigest()


def _content(run: Path) -> dict[str, str]:
    """`stage/file` -> its hash, of everything that does not tell a time; and the rows of scores."""
    found = {}
    for stage in STAGES:
        outputs = json.loads((run / stage / "manifest.json").read_text())["outputs"]
        found |= {f"{stage}/{name}": _hash(run / stage / name, run) for name in outputs
                  if name not in TIMED}
    rows = json.loads((run / "scores" / "results.json").read_text())["rows"]
    found["scores/rows"] = json.dumps(rows, sort_keys=True)
    return found
