#!/usr/bin/env python
"""Kill a run of every stage at random moments, and start it again until it is done.

    scripts/check_kills.py --kills 200 --seed 0         # Linux; some minutes on two cores

The run: import a GGUF file, rescale, train on two processes and on one, extract, merge, evaluate
twice, report and publish to a hub on the loopback interface, all on tiny models. Each life of the
run is ended in one of the stages that are left, drawn evenly, at a moment drawn evenly over the
time that the stage takes undisturbed (more after each kill in it): mostly by SIGKILL (of
everything, of the main process alone, or of one training process), for a share by SIGTERM or
SIGINT. The next life begins at once, orphans or not.

When a run is done, every stage's files must have the hashes of an undisturbed run's, as must what
the hub holds, and no file may be left over. All the while another process reads whatever has its
final name, and must never find a part of a file. Exit code 1 when anything is not so.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from reliability.pipeline import (  # noqa: E402
    RECORDS,
    STAGES,
    check_whole,
    fill_hub,
    outcome,
    take_away,
    write_inputs,
)
from reliability.running import Running  # noqa: E402
from torch import multiprocessing as mp  # noqa: E402

from tests.hub import Hub, running_hub  # noqa: E402
from tests.watching import watch  # noqa: E402

WAYS = {"SIGKILL to all": 6, "SIGKILL to the main process": 4,
        "SIGKILL to one training process": 3, "SIGTERM": 2, "SIGINT": 2}
TOLD = ("goes on", "the same command", "last checkpoint")  # how a message says what to do next
EARLY, EARLY_SECONDS = 0.08, 0.5  # the share that may die before any stage is at work
BEFORE = "before the first"
PATIENCE_SECONDS = 180
BUSY = "is at work on it"  # orphans of the life before have not noticed yet


class Campaign:
    """Runs that are killed, and what came of each life."""

    def __init__(self, directory: Path, hub: Hub, seed: int, until: float):
        self.directory, self.hub, self.rng = directory, hub, random.Random(seed)
        self.until = until
        self.recipe, self.out = write_inputs(directory), directory / "out"
        self.lives: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.runs = 0

    def undisturbed(self) -> None:
        """Run once in peace, and note how long each stage takes."""
        fill_hub(self.hub)
        running, times, stage = Running(self.recipe, self.out, self.directory / "log"), {}, None
        while running.exit_code is None:
            if (now := running.stage()) not in (None, stage):
                stage = now
                times[stage] = time.monotonic()
            time.sleep(0.002)
        if running.exit_code:
            sys.exit(f"the undisturbed run failed:\n{running.log}")
        ends = [*list(times.values())[1:], time.monotonic()]
        self.seconds = {name: end - begin for (name, begin), end in zip(times.items(), ends)}
        self.expected = outcome(self.out, self.hub)
        take_away(self.out)

    def one_run(self, most: int) -> None:
        """Kill a run until it ends by itself, at most `most` times."""
        fill_hub(self.hub)
        shutil.rmtree(self.directory / "cache", ignore_errors=True)  # tokens are made anew, too
        begun, number = len(self.lives), self.runs
        self.runs += 1
        while (len(self.lives) - begun < most and time.monotonic() < self.until
               and self.one_life()):
            pass
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            running = Running(self.recipe, self.out, self.directory / "log")
            if running.join(PATIENCE_SECONDS) == 0:
                break
            if BUSY not in running.log or time.monotonic() > deadline:
                self.problems.append(f"run {number}: could not be finished:\n{running.log[-3000:]}")
                break
        self.compare(number)
        take_away(self.out)

    def one_life(self) -> bool:
        """Start the run and end it; False when it was done before."""
        running = Running(self.recipe, self.out, self.directory / "log")
        early = self.rng.random() < EARLY
        stage = None if early else running.wait_for_work(self.victims())
        way = self.rng.choices(list(WAYS), list(WAYS.values()))[0]
        longest = 1.1 * self.seconds.get(stage, 0.1) * (1 + self.kills_in_a_row(stage) / 4)
        delay = self.rng.uniform(0, EARLY_SECONDS if early else longest)
        until = time.monotonic() + delay
        while running.exit_code is None and time.monotonic() < until:
            time.sleep(min(0.005, max(0.0, until - time.monotonic())))
        workers = running.workers() if "SIGKILL" in way else []
        hit = running.stage()
        if running.exit_code is not None or (way.endswith("training process") and not workers):
            if running.exit_code is None:  # none is training: all, then
                way = "SIGKILL to all"
            elif running.exit_code == 0:
                return False
            elif BUSY in running.log:
                return True
            else:
                self.problems.append(f"it ended by itself:\n{running.log[-3000:]}")
                return True
        pids = {"SIGKILL to all": [running.pid, *workers],
                "SIGKILL to one training process": workers and [self.rng.choice(workers)]
                }.get(way, [running.pid])
        running.send(signal.Signals[way.split()[0]], pids)
        sent = time.monotonic()
        code = running.join(PATIENCE_SECONDS)
        life = {"stage": hit or BEFORE, "way": way, "after_seconds": round(delay, 3),
                "exit_code": code, "seconds_to_end": round(time.monotonic() - sent, 3)}
        if code == 0:
            return False  # it was over before the signal came
        if code is None:
            self.problems.append(f"{life} did not end:\n{running.log[-3000:]}")
            running.send(signal.SIGKILL, [running.pid, *running.workers()])
        if "SIGKILL" not in way or way.endswith("training process"):
            life["told"] = running.log.splitlines()[-1] if running.log else ""
            starting = hit is None and not running.log  # Python itself, before it can say anything
            if not starting and not any(text in running.log for text in TOLD):
                self.problems.append(f"{life}: it does not say how to go on")
        self.lives.append(life)
        self.problems += [f"{life}: {name} is not what its manifest says"
                          for name in check_whole(self.out)]
        return True

    def victims(self) -> list[str]:
        """Stages of which the first at work is killed: those from one on, drawn of what is left."""
        left = [name for name in STAGES if not (self.out / name).exists()]
        return left[self.rng.randrange(len(left)):] if left else list(STAGES)

    def kills_in_a_row(self, stage: str | None) -> int:
        """How often the stage has been killed since it last came to its end."""
        count = 0
        for life in reversed(self.lives):
            if life["stage"] not in (stage, BEFORE):
                break
            count += life["stage"] == stage
        return count

    def compare(self, number: int) -> None:
        found = outcome(self.out, self.hub)
        for stage in STAGES:
            if found[stage] != self.expected[stage]:
                differing = [name for name in found[stage].keys() | self.expected[stage].keys()
                             if found[stage].get(name) != self.expected[stage].get(name)]
                self.problems.append(f"run {number}: {stage} differs in {sorted(differing)}")
        left = sorted(set(os.listdir(self.out)) - {*STAGES, *RECORDS})
        if left:
            self.problems.append(f"run {number}: left over: {left}")


def summary(campaign: Campaign, seen: dict[str, Any], seconds: float,
            args: argparse.Namespace) -> dict[str, Any]:
    lives = campaign.lives
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    by_stage = Counter(life["stage"] for life in lives)
    told = Counter((life["way"], life["told"]) for life in lives if "told" in life)
    return {"command": f"scripts/check_kills.py --kills {args.kills} --seed {args.seed}",
            "commit": commit, "seconds": round(seconds, 1), "kills": len(lives),
            "runs": campaign.runs,
            "stages": {name: by_stage[name] for name in (BEFORE, *STAGES)},
            "ways": dict(Counter(life["way"] for life in lives)),
            "longest_seconds_to_end": {
                way: max((life["seconds_to_end"] for life in lives if life["way"] == way),
                         default=None) for way in WAYS},
            "reader": {"looks": seen["looks"], "files": seen["files"],
                       "partial": len(seen["problems"])},
            "problems": campaign.problems + seen["problems"],
            "told": [{"way": way, "line": line, "times": n}
                     for (way, line), n in told.most_common()],
            "lives": lives}


def table(found: dict[str, Any]) -> str:
    lines = ["# Killed at any moment", "",
             f"`{found['command']}` at commit {found['commit']}: {found['kills']} kills in "
             f"{found['runs']} runs, {found['seconds']} s; {len(found['problems'])} problems. A "
             f"second process looked {found['reader']['looks']:,} times at what was published, "
             f"read {found['reader']['files']:,} files, and found {found['reader']['partial']} "
             "that were partial.", "", "| stage at work | kills |", "| --- | --- |"]
    lines += [f"| {name} | {count} |" for name, count in found["stages"].items()]
    lines += ["", "| how | times | longest until it had ended |", "| --- | --- | --- |"]
    lines += [f"| {way} | {count} | {found['longest_seconds_to_end'][way]:.2f} s |"
              for way, count in found["ways"].items()]
    lines += ["", *[f"- {problem}" for problem in found["problems"]]]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3600,
                        help="after so many no more kills; the run under way is finished")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/reliability")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as name, running_hub() as hub:
        directory = Path(name)
        os.environ.update(hub.environment(directory / "home"))
        os.environ["EXTEND_CACHE"] = str(directory / "cache")
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ.pop(key, None)
        os.chdir(ROOT)
        campaign = Campaign(directory, hub, args.seed, began + args.seconds)
        campaign.undisturbed()
        stop, record = directory / "stop", directory / "seen.json"
        watcher = mp.get_context("forkserver").Process(target=watch,
                                                       args=(campaign.out, stop, record))
        watcher.start()
        while (len(campaign.lives) < args.kills and len(campaign.problems) < 20
               and time.monotonic() < campaign.until):
            campaign.one_run(most=args.kills - len(campaign.lives))
            print(f"{len(campaign.lives)} kills, {campaign.runs} runs, "
                  f"{len(campaign.problems)} problems, {time.monotonic() - began:.0f} s",
                  flush=True)
        stop.touch()
        watcher.join()
        found = summary(campaign, json.loads(record.read_text()), time.monotonic() - began, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kills.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "kills.md").write_text(table(found))
    print(table(found))
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
