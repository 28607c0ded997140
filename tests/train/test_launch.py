"""Starting processes, and telling what went wrong in one of them."""

from pathlib import Path

import pytest

from extend.errors import LayoutError, TrainingError
from extend.train.launch import _parse_error, count_processes
from extend.train.loop import train
from tests.train.tiny import options, save_model


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


def test_the_error_of_a_started_process_is_told_once(tmp_path: Path,
                                                     capfd: pytest.CaptureFixture):
    """Two real processes; a learning rate that makes the second step overflow."""
    run = options(save_model(tmp_path / "model"), [{"kind": "retrieval"}], nproc=2, schedule=[
        {"length": 128, "steps": 3, "lr": 1e30, "rope": {"method": "ntk"}}])
    with pytest.raises(TrainingError, match=r"step 2 of phase 1: loss .* from rows 1 to 1 of "
                                            "retrieval in repeated filler"):
        train(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capfd.readouterr().err
