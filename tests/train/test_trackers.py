"""Trackers: told of every step, of the same run when it goes on, and never a reason to end one."""

import importlib
import logging
import sys
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker

from extend.errors import CompatibilityError
from extend.train import trackers, train
from extend.train.trackers import Tracked, Trackers, check_trackers
from tests.train.tiny import options, save_model


class FakeTracker(GeneralTracker):
    name, requires_logging_directory, tracker = "fake", False, None
    fail_at: int | str | None = None
    made: list["FakeTracker"] = []

    def __init__(self, run: Tracked):
        super().__init__()
        self.run, self.config, self.lines, self.finished = run, None, {}, False
        FakeTracker.made.append(self)

    def start(self):
        if self.fail_at == "start":
            raise RuntimeError("no network; key sk-123456")

    def store_init_configuration(self, values: dict):
        self.config = values

    def log(self, values: dict, step: int | None = None, **kwargs):
        sys.stdout.write("noise")
        if self.fail_at == step:
            raise ConnectionError("gone\nTraceback ...")
        self.lines[step] = values

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", FakeTracker)
    monkeypatch.setattr(importlib.import_module("extend.train.loop"), "check_trackers",
                        lambda names: None)
    monkeypatch.setattr(FakeTracker, "made", [])
    monkeypatch.setattr(FakeTracker, "fail_at", None)
    return FakeTracker


def settings(model: Path = Path("model"), **changes: object):
    return options(model, [{"kind": "retrieval"}], trackers=["tensorboard"], project="p",
                   run_name="r", **changes)


def test_every_step_is_told(fake, tmp_path: Path, capsys: pytest.CaptureFixture):
    phase = {"length": 128, "steps": 10, "lr": 1e-3, "rope": {"method": "ntk"}}
    train(settings(save_model(tmp_path / "model"), schedule=[phase]), tmp_path / "out")
    (tracker,) = fake.made
    assert (tracker.run.project, tracker.run.name, tracker.run.first_step) == ("p", "r", 0)
    assert list(tracker.lines) == list(range(1, 11)) and tracker.finished
    told = {"loss", "nll", "lr", "tokens_per_second", "wait_seconds", "host_memory_bytes"}
    assert told <= tracker.lines[10].keys()
    assert tracker.config["lora_rank"] == 32 and "retrieval" in tracker.config["data"]
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out" / "training.png").stat().st_size > 10_000


@pytest.mark.parametrize(("fail_at", "told"), [
    ("start", "tracker tensorboard failed at the start (RuntimeError: no network; key ***)"),
    (2, "tracker tensorboard failed at the step 2 (ConnectionError: gone); the rest of the run is "
        "missing there and complete in metrics.jsonl")])
def test_one_that_fails_is_told_once(fake, fail_at, told: str, tmp_path: Path,
                                     caplog: pytest.LogCaptureFixture,
                                     monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fake, "fail_at", fail_at)
    monkeypatch.setenv("SERVICE_API_KEY", "sk-123456")
    with caplog.at_level(logging.WARNING):
        running = Trackers(settings(), tmp_path / "out", tmp_path, 0)
        for step in (1, 2, 3):
            running.log({"step": step, "steps": 3, "loss": 1.0})
        running.close()
    assert len(caplog.records) == 1 and caplog.records[0].getMessage().startswith(told)
    assert list(fake.made[0].lines) == ([1] if fail_at == 2 else [])


def test_a_run_that_goes_on_keeps_its_identity(fake, tmp_path: Path):
    for first_step in (0, 3, 0):
        Trackers(settings(), tmp_path / "out", tmp_path, first_step)
    first, again, afresh = (tracker.run.identity for tracker in fake.made)
    assert first == again != afresh
    assert [tracker.config is None for tracker in fake.made] == [False, True, False]


def test_a_missing_package_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompatibilityError, match=r"trackers: wandb needs .*extend-context\[track"):
        check_trackers(["wandb"])
