"""Starting processes, and telling what went wrong in one of them."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from extend.errors import LayoutError, TrainingError
from extend.train import launch
from extend.train.launch import _parse_error, count_processes
from tests.forked import run_python
from tests.train.tiny import options, save_model

ROOT = Path(__file__).parents[2]


def test_count_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert count_processes("auto") == 1
    assert count_processes(4) == 4


def test_a_launcher_decides_the_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_processes("auto") == count_processes(2) == 2
    with pytest.raises(TrainingError, match="nproc is 4, but the launcher started 2"):
        count_processes(4)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert count_processes("auto") == 2
    with pytest.raises(TrainingError, match="nproc is 3, but only 2 GPUs"):
        count_processes(3)


def test_errors_survive_the_way_from_a_worker():
    error = _parse_error("LayoutError: length 7: must divide")
    assert type(error) is LayoutError and str(error) == "length 7: must divide"
    assert _parse_error("RuntimeError: boom") is None
    assert _parse_error("Path: boom") is None


LAUNCH = """\
import sys
from pathlib import Path
from extend.errors import TrainingError
from extend.train_options import TrainOptions
from extend.train.loop import train
from tests.forked import forked_workers

try:
    with forked_workers():
        train(TrainOptions.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
except TrainingError as error:
    print(error)
"""


def test_the_error_of_a_started_process_is_told_once(tmp_path: Path):
    """Two processes; a learning rate that makes the second step overflow."""
    run = options(save_model(tmp_path / "model"), [{"kind": "retrieval"}], nproc=2, schedule=[
        {"length": 128, "steps": 3, "lr": 1e30, "rope": {"method": "ntk"}}])
    done = run_python(["-c", LAUNCH, run.model_dump_json(), tmp_path / "out"], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.match(r"step 2 of phase 1: loss .* from row 1 \(loss .*: facts hidden in repeated "
                    r"filler", done.stdout)
    assert "exit code" not in done.stdout and "{" not in done.stdout
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in done.stderr



def test_ignored_signals_stay_ignored(monkeypatch, tmp_path):
    """As nohup asks for."""
    monkeypatch.setattr(launch, "elastic_launch", lambda *_: lambda *_: os.kill(
        os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch._start(1, tmp_path / "job.json") is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize(("message", "told"), [
    ("TrainingError: stopped by a signal after step 2 of 6", "stopped by a signal after step 2"),
    ("Signal 15 (SIGTERM) received", "stopped by signal SIGTERM; the same command goes on")])
def test_a_signal_reaches_the_processes(monkeypatch, tmp_path, message, told):
    """And later signals mean what they meant before; torch's handlers would raise anywhere."""
    def run(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        while not (tmp_path / "stop").exists():
            time.sleep(0.01)
        raise ChildFailedError("job", {0: failure})

    failure = ProcessFailure(0, 100, -15, "")
    failure.message, failure.error_file_data = message, {"message": message}
    monkeypatch.setattr(launch, "elastic_launch", lambda *_: run)
    before = [signal.getsignal(number) for number in launch._TAKEN]
    with pytest.raises(TrainingError, match=told):
        launch._start(1, tmp_path / "job.json")
    assert [signal.getsignal(number) for number in launch._TAKEN] == before


def test_a_signal_that_comes_too_late_stops_what_follows(monkeypatch, tmp_path):
    def run(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        while not (tmp_path / "stop").exists():
            time.sleep(0.01)

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: run)
    assert launch._start(1, tmp_path / "job.json") == signal.SIGTERM
