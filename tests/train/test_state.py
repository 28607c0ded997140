"""A run that is interrupted anywhere ends with the same bits as one that is not."""

import json
import logging
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from extend.errors import BusyError, CheckpointError, TrainingError
from extend.manifest import hash_file
from extend.train import train
from extend.train.mesh import Processes
from extend.train.state import RunState
from extend.train_options import TrainOptions
from tests.forked import run_python
from tests.train.tiny import options, save_model, save_text

SCHEDULE = [{"length": 64, "steps": 4, "lr": 3e-3},
            {"length": 128, "steps": 4, "batch_rows": 2, "lr": 1e-3, "rope": {"method": "ntk"}}]


class SignalAt(logging.Handler):
    """Sends this process a signal when the progress line of a step is written."""

    def __init__(self, step: int, number: signal.Signals):
        super().__init__()
        self.start, self.number = f"step {step}/", number

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self.start):
            os.kill(os.getpid(), self.number)


def train_until(run: TrainOptions, out: Path, step: int, number: signal.Signals) -> None:
    logger, handler = logging.getLogger("extend.train"), SignalAt(step, number)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        train(run, out)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    directory = tmp_path_factory.mktemp("state")
    torch.set_num_threads(1)  # as in the process that is killed
    model, text = save_model(directory / "model"), save_text(directory)
    return options(model, [{"kind": "text", "path": str(text)}], schedule=SCHEDULE, save_every=3)


@pytest.fixture(scope="module")
def undisturbed(run: TrainOptions) -> Path:
    return train(run, Path(run.model).parent / "undisturbed")


def assert_same_run(out: Path, undisturbed: Path) -> None:
    assert hash_file(out / "model.safetensors") == hash_file(undisturbed / "model.safetensors")
    timeless = [[{k: line[k] for k in ("step", "loss", "lr", "grad_norm", "tokens")} for line in
                 map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]
                for path in (out, undisturbed)]
    assert timeless[0] == timeless[1]
    assert not out.with_name(out.name + ".state").exists()


def test_killed_and_started_again(run: TrainOptions, undisturbed: Path, tmp_path: Path):
    out, state = tmp_path / "out", tmp_path / "out.state"
    script = ("import signal, sys, torch; from pathlib import Path\n"
              "from extend.train_options import TrainOptions\n"
              "from tests.train.test_state import train_until\n"
              "torch.set_num_threads(1)\n"
              "run = TrainOptions.model_validate_json(sys.argv[1])\n"
              "train_until(run, Path(sys.argv[2]), 5, signal.SIGKILL)\n")
    killed = run_python(["-c", script, run.model_dump_json(), out], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists() and (state / "step-3").is_dir()
    assert len((state / "metrics.jsonl").read_text().splitlines()) == 5
    # What a kill in the middle of a save and of a line would leave.
    (state / ".step-6.partial").mkdir()
    (state / ".step-6.partial" / "half").write_bytes(b"half")
    with (state / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(run, out)
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize(("number", "background"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_signal_finishes_and_saves_the_step(number: signal.Signals, background: bool,
                                            run: TrainOptions, undisturbed: Path, tmp_path: Path):
    run = run.model_copy(update={"save_in_background": background})
    before = signal.getsignal(number)
    with pytest.raises(TrainingError, match="stopped by a signal after step 5 of 8.*goes on"):
        train_until(run, tmp_path / "out", 4, number)
    assert signal.getsignal(number) is before
    assert (tmp_path / "out.state" / "step-5").is_dir()
    assert not (tmp_path / "out").exists()
    train(run, tmp_path / "out")
    assert_same_run(tmp_path / "out", undisturbed)


def test_a_write_that_fails_in_the_background_is_told(run: TrainOptions, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch):
    """By the step that would write the next one; what was complete stays."""
    plain, steps = dcp.save, []

    def save(tensors: dict, checkpoint_id: Path, **options: object) -> None:
        steps.append(checkpoint_id.name)
        if len(steps) == 2:
            (checkpoint_id / "half").parent.mkdir()
            raise OSError(28, "No space left on device")
        plain(tensors, checkpoint_id=checkpoint_id, **options)

    monkeypatch.setattr(dcp, "save", save)
    run = run.model_copy(update={"save_in_background": True})
    with pytest.raises(CheckpointError, match=r"step-6.partial: the training state cannot be wr"):
        train(run, tmp_path / "out")
    assert steps == [".step-3.partial", ".step-6.partial"]
    assert sorted(path.name for path in (tmp_path / "out.state").iterdir()) == [
        "metrics.jsonl", "run.json", "step-3"]


def test_two_runs_in_one_directory_are_refused(tmp_path: Path):
    alone = Processes(0, 1, torch.device("cpu"), None)
    with RunState(tmp_path / "out", alone), ThreadPoolExecutor(1) as elsewhere:
        second = elsewhere.submit(RunState(tmp_path / "out", alone).__enter__)
        with pytest.raises(BusyError, match=rf"/out: process {os.getpid()} \(.*is at work on it"):
            second.result()
    with RunState(tmp_path / "out", alone) as third:
        third.open({})


def test_state_of_another_run_is_refused(run: TrainOptions, tmp_path: Path):
    with pytest.raises(TrainingError, match="stopped"):
        train_until(run, tmp_path / "out", 4, signal.SIGTERM)
    other = run.model_copy(update={"clip_norm": 0.5})
    with pytest.raises(TrainingError, match=r"options\.clip_norm was 1\.0, is 0\.5") as caught:
        train(other, tmp_path / "out")
    assert str(tmp_path / "out.state") in str(caught.value)
    assert (tmp_path / "out.state" / "step-5").is_dir()  # nothing is lost
    # How often it is saved does not matter.
    train(run.model_copy(update={"save_every": 1}), tmp_path / "out")


def damage(file: Path) -> None:
    """Turn one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_found_by_its_hash(run: TrainOptions, undisturbed: Path,
                                                   tmp_path: Path,
                                                   caplog: pytest.LogCaptureFixture):
    """The one before is used, and says so; without one, nothing is."""
    run, out = run.model_copy(update={"keep_checkpoints": 2}), tmp_path / "out"
    with pytest.raises(TrainingError, match="stopped by a signal after step 7"):
        train_until(run, out, 6, signal.SIGTERM)
    state = tmp_path / "out.state"
    assert sorted(path.name for path in state.glob("step-*")) == ["step-6", "step-7"]
    damage(state / "step-7" / "__0_0.distcp")
    shutil.copytree(state, tmp_path / "copy.state")
    with caplog.at_level(logging.WARNING, logger="extend"):
        train(run, out)
    assert_same_run(out, undisturbed)
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING
              and r.name == "extend.train.state"]
    assert "step-7: the training state is damaged" in line and "goes on after step 6" in line
    shutil.rmtree(tmp_path / "copy.state" / "step-6")
    with pytest.raises(CheckpointError, match="__0_0.distcp has the sha256 .*none before it"):
        train(run, tmp_path / "copy")
    assert (tmp_path / "copy.state" / "step-7").is_dir()  # what may be of use stays
