#!/usr/bin/env python
"""Let the disk refuse every change in turn that a stage makes, and see what is left.

    scripts/check_disks.py --every 1              # Linux; --every 5 tries every fifth change only

Each stage (import, rescale, train, extract, merge, eval, report) runs in a forked process on tiny
models, once undisturbed and then once for every change that it makes to the file system: a file
opened to be written, a directory made, a rename, a removal. That change fails with ENOSPC, EDQUOT,
EROFS or EIO in turn, as do all later ones but removals: a full disk stays full. Beside that, files
may not grow beyond some bytes (RLIMIT_FSIZE), so that writes, and memory-mapped files, fail in the
middle; each change takes 0.2 s longer; and, for root, the output lies on a file system of less than
its size. The stage must end with one error that is an ExtendError, leave its inputs as they were
and nothing beside them but what resuming needs, and give the undisturbed hashes when it runs again.
Exit code 1 when it does not.
"""

import argparse
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from reliability.pipeline import write_inputs  # noqa: E402

import extend.adapter  # noqa: E402
import extend.evaluate  # noqa: E402
import extend.gguf  # noqa: E402
import extend.merge  # noqa: E402
from extend.curves import METRICS_NAME  # noqa: E402
from extend.errors import ExtendError  # noqa: E402
from extend.manifest import MANIFEST_NAME, hash_files  # noqa: E402
from extend.train.loop import train as run_training  # noqa: E402
from tests.train.tiny import options  # noqa: E402

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
MAKING = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "shutil.copyfile"}
REMOVING = {"os.remove", "os.rmdir"}
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)  # of an output's bytes that a disk has
SIZES = (0, 100, 1000, 4096, 20_000)  # bytes that a file may have
SLOW = 0.2  # seconds that a slow disk takes for each change
Stage = Callable[[Path], object]


def refuse(count: int, code: int, below: str, *, pause: float = 0.0) -> None:
    """Fail at change number `count` (from 1) below a path, and at later ones that need space; each
    change takes `pause` seconds more.
    """
    seen = [0]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        making = event in MAKING or (event == "open" and isinstance(args[2], int)
                                     and args[2] & (os.O_WRONLY | os.O_RDWR))
        if not (making or event in REMOVING) or not any(str(a).startswith(below) for a in args):
            return
        seen[0] += 1
        time.sleep(pause)
        if seen[0] == count or (making and seen[0] > count > 0):
            raise OSError(code, os.strerror(code), str(args[0]))

    sys.addaudithook(watch)
    watch.seen = seen
    refuse.seen = seen


def attempt(stage: Stage, out: Path, prepare: Callable[[], None]) -> dict[str, Any]:
    """Run a stage in a forked process; how it ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        told = {"kind": None, "text": ""}
        try:
            prepare()
            stage(out)
        except BaseException as error:
            told = {"kind": type(error).__name__, "text": str(error),
                    "ours": isinstance(error, ExtendError)}
        told["changes"] = getattr(refuse, "seen", [0])[0]
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(data) if data else {"kind": "died", "text": "", "ours": False}


def outcome(out: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in hash_files(out).items()
            if name not in (MANIFEST_NAME, METRICS_NAME)}


def trials_of(changes: int, place: Path, every: int) -> list[tuple[str, Callable[[], None]]]:
    """What is done to a stage, and how it is called."""
    found = []
    for number, count in enumerate(range(1, changes + 1, every)):
        code = ERRORS[number % len(ERRORS)]
        found.append((f"change {count}: {errno.errorcode[code]}",
                      lambda count=count, code=code: refuse(count, code, str(place))))
    largest = max(file.stat().st_size for file in (place / "plain").iterdir())
    for size in filter(lambda size: size < largest, SIZES):
        found.append((f"files of at most {size} bytes", lambda size=size: resource.setrlimit(
            resource.RLIMIT_FSIZE, (size, size))))
    return found


def faults(out: Path) -> list[str]:
    """What a stage that failed should not have left beside its output."""
    own = {"plain", out.name, f"{out.name}.state", f".{out.name}.partial", f".{out.name}.parts",
           f".{out.name}.rows"}
    left = sorted(path.name for path in out.parent.iterdir()
                  if path.name not in own and not path.name.endswith(".removed"))
    return [f"left {left}"] if left else []


def beside(out: Path) -> list[Path]:
    """What belongs to an output, but is not it."""
    return [path for path in out.parent.glob(f"*{out.name}.*") if path != out]


def clear(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def trial(stage: Stage, out: Path, prepare: Callable[[], None], make_room: Callable[[], None],
          expected: dict[str, str], unchanged: Callable[[], bool]
          ) -> tuple[dict[str, Any], list[str]]:
    """How a stage ended on a bad disk, and all that is wrong with that, or once there is room."""
    told, found = attempt(stage, out, prepare), []
    if told["kind"] is None:  # what could not be deleted after all was done is in nobody's way
        clear(beside(out))
    else:
        found += [] if told["ours"] else [f"{told['kind']}: {told['text'][:300]}"]
        found += ["failed, but left an output"] if out.exists() else []
    found += faults(out) + ([] if unchanged() else ["an input has changed"])
    make_room()
    if not out.exists():
        again = attempt(stage, out, lambda: None)
        if again["kind"] is not None:
            return told, [*found, f"then with space: {again['text'][:300]}"]
    found += ["another outcome"] if outcome(out) != expected else []
    found += [f"{path.name} stays when it is done" for path in beside(out)]
    clear([*beside(out), out])
    return told, found


def check(name: str, stage: Stage, place: Path, inputs: Path, every: int) -> dict[str, Any]:
    """All trials of a stage, each in a directory of its own."""
    place.mkdir()
    before = hash_files(inputs)
    plain = attempt(stage, place / "plain", lambda: refuse(0, 0, str(place)))
    if plain["kind"] is not None:
        sys.exit(f"{name}, undisturbed: {plain}")
    expected = outcome(place / "plain")
    problems, kinds, said = [], Counter(), {}

    def note(what: str, *given: Any) -> None:
        told, found = trial(stage, *given, expected, lambda: hash_files(inputs) == before)
        kinds[told["kind"] or "none: it could do without"] += 1
        said.setdefault(told["kind"], f"{what}: {told['text']}")
        problems.extend(f"{name}, {what}: {fault}" for fault in found)

    for number, (what, prepare) in enumerate(trials_of(plain["changes"], place, every)):
        note(what, place / f"trial-{number}", prepare, lambda: None)
    note("a slow disk", place / "slow", lambda: refuse(0, 0, str(place), pause=SLOW), lambda: None)
    size = sum(file.stat().st_size for file in (place / "plain").iterdir())
    for share in SHARES if os.geteuid() == 0 else ():
        with small_disk(place / "disk", int(share * size)) as (disk, make_room):
            note(f"a disk of {share:.0%} of the output", disk / "out", lambda: None, make_room)
    return {"changes": plain["changes"], "trials": kinds.total(), "ended_with": dict(kinds),
            "said": {kind: text for kind, text in said.items() if kind}, "problems": problems}


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system of so many bytes in memory, and what makes it larger; root alone may."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(place)],
                   check=True)
    try:
        yield place, lambda: subprocess.run(
            ["mount", "-o", "remount,size=1g", str(place)], check=True) and None
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def stages(inputs: Path) -> dict[str, Stage]:
    """Each on what the ones before it have made."""
    base, long = inputs / "base", inputs / "long"

    def train(model: Path, kind: str, file: str) -> Stage:
        run = options(model, [{"kind": kind, "path": str(inputs / file)}], save_every=1,
                      token_cache=str(inputs.parent / "tokens"),
                      schedule=[{"length": 128, "steps": 2, "lr": 1e-3}])
        return lambda out: run_training(run, out)

    return {
        "import": lambda out: extend.gguf.import_gguf(
            inputs / "base.gguf", out, tokenizer=inputs / "tokenizer", dtype="float32"),
        "rescale": lambda out: extend.rescale(base, out, target_len=128, method="ntk"),
        "train": train(inputs / "rescaled", "text", "text.jsonl"),
        "extract": lambda out: extend.extract(base, long, out, rank=4),
        "merge": lambda out: extend.merge(inputs / "adapter", base, out),
        "eval": lambda out: extend.evaluate(base, out, tasks=["passkey"], lengths=[320], depths=1,
                                            trials=1),
        "report": lambda out: extend.report({"base": inputs / "results"}, out)}


MADE = {"import": "base", "rescale": "rescaled", "train": "long", "extract": "adapter",
        "merge": "merged", "eval": "results", "report": "page"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--stages", nargs="+", choices=MADE, default=list(MADE))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/reliability")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, found = time.monotonic(), {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="disks-") as directory:
        inputs = Path(directory) / "inputs"
        inputs.mkdir()
        write_inputs(inputs)
        for name, stage in stages(inputs).items():
            made = attempt(stage, inputs / MADE[name], lambda: None)
            if made["kind"] is not None:
                sys.exit(f"{name}: {made}")
            if name in args.stages:
                found[name] = check(name, stage, Path(directory) / name, inputs, args.every)
                print(name, json.dumps(found[name]), flush=True)
    problems = [problem for entry in found.values() for problem in entry["problems"]]
    record = {"command": f"scripts/check_disks.py --every {args.every} --stages "
                         f"{' '.join(args.stages)}", "commit": commit,
              "seconds": round(time.monotonic() - began, 1), "stages": found}
    lines = ["# Full and failing disks", "", f"`{record['command']}` at commit {commit}: "
             f"{sum(entry['trials'] for entry in found.values())} trials in {record['seconds']} s, "
             f"{len(problems)} problems.", "", "| stage | changes it makes | trials | ended with |",
             "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {entry['changes']} | {entry['trials']} | "
              + ", ".join(f"{kind} {n}" for kind, n in entry["ended_with"].items()) + " |"
              for name, entry in found.items()]
    lines += ["", *[f"- {problem}" for problem in problems]]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "disks.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "disks.md").write_text("\n".join(lines).rstrip() + "\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
