"""Rows that teach what the model that training began with predicts."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from extend.capacity.memory import plan_memory
from extend.capacity.recompute import phase_setup
from extend.capacity.shape import model_shape
from extend.errors import CompatibilityError
from extend.model_config import read_config
from extend.rope import rescale
from extend.train.loop import train
from tests.train.tiny import options, save_model, save_text

PHASE = {"length": 256, "batch_rows": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("distill")
    text = {"kind": "text", "path": str(save_text(directory / "data"))}
    return save_model(directory / "model"), text | {"document_length": 64, "distill": True}


def divergences(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["divergence"] for line in lines]


@pytest.mark.parametrize(("lr", "mode"), [(1e-3, {}), (5e-3, {"mode": "lora", "lora_rank": 8})])
def test_what_a_rope_takes_comes_back(lr: float, mode: dict, files: tuple[Path, dict],
                                      tmp_path: Path):
    model, kept = files
    rope = {"rope": {"method": "critical"}, "rope_to": 1024}
    run = options(model, [kept], schedule=[PHASE | rope | {"steps": 30, "lr": lr}], **mode)
    found = divergences(train(run, tmp_path / "out"))
    # Of the untrained tiny model text says nothing; its own predictions can be had again.
    assert found[0] > 0.01 and sum(found[-5:]) / 5 < 0.5 * found[0]


def test_where_nothing_changed_there_is_nothing_to_learn(files: tuple[Path, dict], tmp_path: Path):
    model, kept = files
    run = options(model, [kept | {"rope": "native"}], schedule=[PHASE | {"steps": 1}])
    out = train(run, tmp_path / "out")
    line = json.loads((out / "metrics.jsonl").read_text())
    # Both read the same in fp32, to the last bits of log-softmaxes over a few hundred tokens.
    assert abs(line["divergence"]) < 1e-6 and line["grad_norm"] < 1e-5
    assert line["loss"] == pytest.approx(line["divergence"], abs=1e-9) and line["nll"] > 1


def test_metrics_tell_both_losses_apart(files: tuple[Path, dict], tmp_path: Path):
    model, kept = files
    both = [kept | {"rope": "native"}, {"kind": "text", "path": kept["path"]}]
    out = train(options(model, both, schedule=[PHASE | {"steps": 1}]), tmp_path / "out")
    line = json.loads((out / "metrics.jsonl").read_text())
    assert abs(line["divergence"]) < 1e-6
    assert 0.3 * line["nll"] < line["loss"] < 0.7 * line["nll"]  # one row of two has no loss


def test_the_planner_counts_the_teacher(files: tuple[Path, dict]):
    model, kept = files
    shape = model_shape(read_config(model))
    plain, taught = (options(model, [kept | {"distill": distill}],
                             schedule=[PHASE | {"steps": 1}]) for distill in (False, True))
    for world in (1, 2):
        least, more = ({moment.name: moment.total for moment in plan_memory(
            shape, phase_setup(run, run.schedule[0], world=world)).moments}
            for run in (plain, taught))
        root = shape.root_parameters if world > 1 else 0
        weights = 2 * (shape.parameters / world + root)
        assert more["update"] - least["update"] == pytest.approx(weights)
        hidden = 2 * shape.hidden * 256 * (2 if world == 1 else 1)  # two rows at once, or one each
        assert more["head"] - least["head"] == pytest.approx(weights + hidden)


def test_a_teacher_of_its_own_teaches_a_model_that_was_rescaled(files: tuple[Path, dict],
                                                                tmp_path: Path):
    model, kept = files
    rescaled = rescale(model, tmp_path / "rescaled", target_len=1024, method="critical")
    run = options(rescaled, [kept], schedule=[PHASE | {"steps": 30}], teacher=str(model))
    found = divergences(train(run, tmp_path / "out"))
    assert found[0] > 0.01 and sum(found[-5:]) / 5 < 0.5 * found[0]
    alone = run.model_copy(update={"teacher": None, "schedule": [run.schedule[0].model_copy(
        update={"steps": 1})]})
    assert abs(divergences(train(alone, tmp_path / "alone"))[0]) < 1e-6


def test_a_teacher_that_cannot_teach_is_refused(files: tuple[Path, dict], tmp_path: Path):
    model, kept = files
    with pytest.raises(ValidationError, match="but no source of data says distill; leave it out"):
        options(model, [kept | {"distill": False}], teacher=str(model))
    other = save_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    run = options(model, [kept], schedule=[PHASE | {"steps": 1}], teacher=str(other))
    with pytest.raises(CompatibilityError, match="has 7 tokens, but .* has .* the same tokenizer"):
        train(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
