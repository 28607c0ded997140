"""One of two processes dies, hangs or runs out of memory: all end soon, or start again if asked."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from extend.manifest import hash_file
from tests.forked import run_python
from tests.train.tiny import options, save_model, save_text

ROOT = Path(__file__).parents[2]
# Every process of the launch is forked from this program, so what is replaced here is in all.
PROGRAM = """\
import logging, os, signal, sys, time
from pathlib import Path
from unittest import mock
from extend import together
from extend.console import showing_logs
from extend.errors import ExtendError
from extend.train import loop
from extend.train_options import TrainOptions
from tests.forked import forked_workers

run, out, way = TrainOptions.model_validate_json(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
together._SILENCE_SECONDS = 3.0 if way == "SIGSTOP" else 60.0
take, mark = loop.train_step, Path(sys.argv[2] + ".failed")

def train_step(run, number, mesh, step, work, stopped):
    if way == "stop":
        time.sleep(0.4)
        if run.processes.is_main and step == 1:
            os.kill(os.getppid(), signal.SIGTERM)
    elif run.processes.rank == 1 and step == 3 and not mark.exists():
        mark.touch()
        if way == "memory":
            raise MemoryError("no room for a tensor")
        os.kill(os.getpid(), getattr(signal, way))
    return take(run, number, mesh, step, work, stopped)

loop.train_step = train_step
try:
    with forked_workers(), showing_logs(logging.WARNING):
        loop.train(run, out)
except ExtendError as error:
    print(type(error).__name__, error)
"""
WAYS = {"SIGKILL": "RankError process 1 ended with exit code -9",
        "SIGSTOP": r"SilentRankError process 1 has given no sign of life for 3 s: it was stopped "
                   r"or hung \(pid \d+ on .*\), and was ended",
        "memory": "RankError process 1 ended with exit code 1: MemoryError: no room for a tensor"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("restarts")
    model, text = save_model(directory / "model"), save_text(directory)
    run = options(model, [{"kind": "text", "path": str(text)}], nproc=2, save_every=2,
                  schedule=[{"length": 64, "steps": 6, "lr": 1e-3, "batch_rows": 1}])
    return json.loads(run.model_dump_json())


def start(settings: dict, out: Path, way: str, restarts: int):
    run = json.dumps(settings | {"restarts": restarts})
    began = time.monotonic()
    done = run_python(["-c", PROGRAM, run, out, way], cwd=ROOT, env=os.environ)
    return done, time.monotonic() - began


@pytest.mark.parametrize("way", WAYS)
def test_all_end_and_the_first_cause_is_told(way: str, settings: dict, tmp_path: Path):
    done, seconds = start(settings, tmp_path / "out", way, 0)
    assert re.match(WAYS[way], done.stdout), done.stdout + done.stderr
    assert "goes on from the last checkpoint" in done.stdout and seconds < 60
    assert (tmp_path / "out.state" / "step-2").is_dir() and not (tmp_path / "out").exists()


def test_a_signal_to_the_launcher_ends_all_after_their_step(settings: dict, tmp_path: Path):
    done, _ = start(settings, tmp_path / "out", "stop", 0)
    told = re.match(r"TrainingError stopped by a signal after step (\d) of 6; it is saved in",
                    done.stdout)
    assert told, done.stdout + done.stderr
    assert (tmp_path / f"out.state/step-{told[1]}").is_dir() and not (tmp_path / "out").exists()


def test_it_starts_again_when_asked(settings: dict, tmp_path: Path):
    (tmp_path / "plain.failed").touch()  # nothing happens
    done, _ = start(settings, tmp_path / "plain", "SIGKILL", 0)
    assert done.stdout == "", done.stdout
    done, _ = start(settings, tmp_path / "out", "SIGKILL", 1)
    assert done.stdout == "", done.stdout + done.stderr
    assert re.search(r"process 1 ended with exit code -9.*starting again from the last checkpoint "
                     r"\(0 restarts left", done.stderr, re.DOTALL)
    assert hash_file(tmp_path / "out/model.safetensors") == hash_file(
        tmp_path / "plain/model.safetensors")
