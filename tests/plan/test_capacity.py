"""`extend plan` with a machine: from a config alone, as JSON and as text."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from extend.capacity import GPUS
from extend.cli import main
from extend.cli.plan import GPU_NAMES
from extend.errors import RecipeError
from extend.plan import plan
from extend.train_options import TrainOptions
from tests.capacity.test_planner import LLAMA_8B


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_8B))
    return str(file)


def run(*arguments: str):
    return CliRunner().invoke(main, ["plan", *arguments])


def test_json(config):
    result = run(config, "--to", "64k", "--gpus", "2", "--weight-dtype", "bfloat16", "--rows", "1",
                 "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["rope"]["methods"]) >= {"ntk", "critical"}
    memory, time = found["memory"], found["time"]
    assert memory["fits"] and memory["parameters"] == 8030261248
    assert sum(memory["device_parts_bytes"].values()) == pytest.approx(memory["device_peak_bytes"])
    assert memory["device_peak_bytes"] <= memory["device_usable_bytes"]
    assert found["parallel"]["context"] == 2
    assert sum(time["parts_seconds"].values()) == pytest.approx(time["step_seconds"])
    assert time["tokens_per_second"] == pytest.approx(65536 / time["step_seconds"])


def test_its_keys_are_those_of_a_recipe(config):
    """With what a plan cannot know, they make the options of a run."""
    for flags in ([], ["--trained", "lora+", "--optimizer", "adamw-8bit"]):
        given = ["--to", "256k", "--gpus", "8", "--host-memory", "500", "--json", *flags]
        result = run(config, *given)
        recipe = json.loads(result.stdout)["parallel"]["recipe"]
        phases = [phase | {"steps": 1, "lr": 1e-5} for phase in recipe.pop("schedule")]
        made = TrainOptions(model=".", data=[{"kind": "retrieval"}], schedule=phases, **recipe)
        assert made.schedule[0].length == 262144


def test_text(config):
    result = run(config, "--to", "1m", "--gpus", "1", "--gpu", "h100")
    assert result.exit_code == 0, result.output
    assert "does not fit on 1 x H100 80GB even with weights in bfloat16" in result.stdout
    assert "the nearest that fits" in result.stdout
    result = run(config, "--to", "256k", "--gpus", "2", "--host-memory", "100")
    assert result.exit_code == 0, result.output
    assert "s a step of 1 row" in result.stdout


def test_without_a_machine_there_is_nothing_to_say(config):
    found = json.loads(run(config, "--to", "64k", "--json").stdout)
    assert [found[key] for key in ("memory", "parallel", "time")] == [None] * 3


def test_a_machine_needs_a_model():
    with pytest.raises(RecipeError, match="--gpus needs a model"):
        plan(head_dim=128, rope_theta=5e5, from_len=8192, target_len=65536, machine={"gpus": 2})


def test_unknown_gpu(config):
    assert set(GPU_NAMES) == set(GPUS)
    result = run(config, "--to", "64k", "--gpus", "2", "--gpu", "h2000")
    assert result.exit_code == 2 and "h200" in result.output
