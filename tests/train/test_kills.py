"""A run that is killed again and again, wherever it writes, ends with the bits of one that is not.

`test_state.py` kills one between two steps; here it dies at a change to the file system: a
checkpoint begun, written, renamed, the one before half deleted, the output complete but unnamed.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from extend.manifest import hash_file
from extend.train import train
from extend.train.loop import run_process
from extend.train_options import TrainOptions
from tests.spawn import PRELOAD, spawn
from tests.train.tiny import options, save_model, save_text

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def die_at(count: int, below: str) -> None:
    """SIGKILL this process before its change number `count` (from 1) to files under a path."""
    left = [count]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event in CHANGES or (event == "open" and isinstance(args[2], int)
                                      and args[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and any(str(arg).startswith(below) for arg in args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run_alone(run: str, out: str, count: int) -> None:
    torch.set_num_threads(1)
    die_at(count, out)
    train(TrainOptions.model_validate_json(run), out)


def run_together(rank: int, world: int, run: str, out: str, count: int) -> None:
    if rank == world - 1:
        die_at(count, f"{out}.state/.step-4.partial/__1")
    run_process(TrainOptions.model_validate_json(run), Path(out), False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("kills")
    model, text = save_model(directory / "model"), save_text(directory)
    phases = [{"length": 64, "steps": 2, "lr": 1e-3},
              {"length": 128, "steps": 2, "lr": 1e-3, "batch_rows": 2}]
    return options(model, [{"kind": "text", "path": str(text)}], schedule=phases,
                   save_every=2).model_dump_json()


def outcome(out: Path) -> tuple[str, list[float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return hash_file(out / "model.safetensors"), [json.loads(line)["loss"] for line in lines]


def test_killed_wherever_it_writes(run: str, tmp_path: Path):
    train(TrainOptions.model_validate_json(run), tmp_path / "undisturbed")
    multiprocessing.set_forkserver_preload(PRELOAD)
    context, out = multiprocessing.get_context("forkserver"), tmp_path / "out"
    draw, codes = random.Random(0), []
    # A run of four steps makes two dozen changes; the later ones come from what is left to do.
    for most in (12, 16, 18, sys.maxsize):
        count = draw.randint(most - 6, most) if most < 100 else most
        process = context.Process(target=run_alone, args=(run, str(out), count))
        process.start()
        process.join()
        codes.append(process.exitcode)
    assert codes.count(-signal.SIGKILL) >= 3 and codes[-1] == 0
    assert outcome(out) == outcome(tmp_path / "undisturbed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_one_of_two_processes_is_killed_in_the_middle_of_a_save(run: str, tmp_path: Path):
    spawn(2, run_together, run, str(tmp_path / "undisturbed"), -1)
    with pytest.raises(Exception, match="SIGKILL|terminated|closed"):
        spawn(2, run_together, run, str(tmp_path / "out"), 1)
    state = tmp_path / "out.state"
    assert (state / "step-2").is_dir() and (state / ".step-4.partial").is_dir()
    spawn(2, run_together, run, str(tmp_path / "out"), -1)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "undisturbed")
    assert not state.exists()
