"""A saved step as a checkpoint, against what the run itself writes."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from extend.cli import main
from extend.errors import CheckpointError
from extend.manifest import hash_file
from extend.model_config import read_json
from extend.train import loop, train
from extend.train_options import TrainOptions
from tests.train.tiny import options, save_model

SCHEDULE = [{"length": 128, "steps": 2, "lr": 3e-3},
            {"length": 256, "steps": 2, "lr": 1e-3, "rope": {"method": "ntk"}}]


def export(*arguments: object) -> str:
    """Run the command; what it said, standard error last."""
    done = CliRunner().invoke(main, ["export", *map(str, arguments)])
    assert (done.exit_code == 0) == ("extend: " not in done.stderr), done.output
    return done.stderr.strip().splitlines()[-1] if done.exit_code else done.stdout.strip()


def train_but_the_end(run: TrainOptions, out: Path) -> Path:
    """The state of a run that took every step, and could not write its output."""
    def refuse(*_: object) -> None:
        raise CheckpointError("full")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="full"):
        patch.setattr(loop, "write_output", refuse)
        train(run, out)
    return out.with_name(f"{out.name}.state")


def make_run(directory: Path, **changes: object) -> TrainOptions:
    return options(save_model(directory / "model"), [{"kind": "retrieval"}], schedule=SCHEDULE,
                   save_every=1, keep_checkpoints=3, **changes)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    return train_but_the_end(make_run(directory), directory / "out")


@pytest.mark.parametrize("changes", [
    {"mode": "full"}, {"mode": "lora", "lora_rank": 4, "export_dtype": "bfloat16"}])
def test_the_last_step_is_what_the_run_writes(changes: dict, tmp_path: Path):
    run = make_run(tmp_path, **changes)
    state = train_but_the_end(run, tmp_path / "out")
    assert export(state, "--out", tmp_path / "step") == str(tmp_path / "step")
    train(run, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in (tmp_path / "step").iterdir()}
    for name in written - {"manifest.json"}:
        assert hash_file(tmp_path / "step" / name) == hash_file(tmp_path / "out" / name), name
    assert read_json(tmp_path / "step" / "manifest.json")["stage"] == "export"


def test_a_step_has_the_rope_of_its_phase(state: Path, tmp_path: Path):
    """The last three checkpoints are kept; the second is the end of the first phase."""
    assert sorted(path.name for path in state.glob("step-*")) == ["step-2", "step-3", "step-4"]
    configs = []
    for step in (2, 3):
        export(state / f"step-{step}", "--out", tmp_path / str(step), "--dtype", "bfloat16")
        configs.append(read_json(tmp_path / str(step) / "config.json"))
        assert len((tmp_path / str(step) / "metrics.jsonl").read_text().splitlines()) == step
        assert {str(t.dtype) for t in load_file(
            tmp_path / str(step) / "model.safetensors").values()} == {"torch.bfloat16"}
    assert [config["max_position_embeddings"] for config in configs] == [128, 256]
    assert configs[0]["rope_theta"] == 10000 < configs[1]["rope_theta"]


def test_what_cannot_be_exported_is_refused(state: Path, tmp_path: Path):
    out, other = tmp_path / "out", save_model(tmp_path / "other", seed=1)
    assert export(state / "step-1", "--out", out).endswith(
        "step-1: no such step; the run has saved step-2, step-3, step-4")
    assert "no training state; give <out>.state/step-N" in export(tmp_path, "--out", out)
    assert "is not the model that the run started from" in export(
        state, "--out", out, "--model", other)
    assert "lie in one another" in export(state, "--out", state / "exported")
    out.mkdir()
    (out / "file").touch()
    assert "exists already" in export(state, "--out", out)
    shutil.copytree(state, tmp_path / "damaged.state")
    for file in (tmp_path / "damaged.state").glob("step-4/*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    assert "0.distcp has the sha256" in export(tmp_path / "damaged.state", "--out",
                                               tmp_path / "new")
    assert not (tmp_path / "new").exists()
