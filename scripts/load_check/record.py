"""What every check of the load leaves: its figures in load.json, a table of all in load.md."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The checkout's commit, and whether it was changed since."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True,
                              text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def hardware() -> str:
    """Cores, processor and memory."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().split(
        "\n") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}, {memory:.0f} GiB"


def save(results: Path, name: str, command: str, figures: Mapping[str, Any],
         failures: list[str]) -> None:
    """Put one check's figures beside the others' in `results`."""
    results.mkdir(parents=True, exist_ok=True)
    file = results / "load.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known[name] = {"command": command, "commit": commit(), "hardware": hardware(),
                   "load_average": [round(value, 1) for value in os.getloadavg()],
                   "when": datetime.now(UTC).isoformat(timespec="seconds"),
                   "passed": not failures, "failures": failures, "figures": dict(figures)}
    file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    (results / "load.md").write_text(table(known), encoding="utf-8")


def table(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Every check as a section of Markdown."""
    lines = ["# Load", "", "Made by `scripts/check_load.py`; the same as data: `load.json`."]
    for name, check in checks.items():
        lines += ["", f"## {name}: {'passed' if check['passed'] else 'FAILED'}", "",
                  f"`{check['command']}`, commit {check['commit']}, {check['hardware']}, load "
                  f"average {check['load_average'][0]}, {check['when'][:10]}", ""]
        lines += [f"- failed: {failure}" for failure in check["failures"]]
        lines += ["| figure | value |", "| --- | --- |"]
        lines += [f"| {key} | {_words(value)} |" for key, value in check["figures"].items()]
    return "\n".join(lines) + "\n"


def _words(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(entry)}" for key, entry in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def resident_bytes(pid: int) -> int:
    """Of a process now; 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def environment(**more: str) -> dict[str, str]:
    """Of a command of this checkout that uses one thread and no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **more}


class Stopwatch:
    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self._begin, 2)
