"""What a plan says of models on the Hub, against a hub on the loopback interface."""

import json

import pytest
import yaml
from huggingface_hub import constants, snapshot_download

from extend.capacity import GIB, Machine
from extend.errors import RecipeError
from extend.recipe_plan import plan_json, plan_recipe, plan_text
from extend.recipe_plan.known import known_config
from tests.hub import STRANGER

FILES = {"config.json": json.dumps(known_config("Qwen3-8B")[1]), "tokenizer.json": b"{}",
         "model.safetensors": b"w" * 2**21, "pytorch_model.bin": b"p" * 2**22}
STAGES = [{"name": "wide", "stage": "rescale", "model": "lab/base@v1", "to": "128k"},
          {"name": "more", "stage": "rescale", "model": "wide", "to": "256k"}]


@pytest.fixture
def planned(hub, tmp_path):
    """Plans the recipe with the hub as it is then."""
    hub.add("lab/base", FILES, tag="v1")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "unit", "stages": STAGES}))
    return lambda **options: plan_recipe(path, machine=Machine(
        gpu="h200", num_gpus=1, gpu_memory_bytes=139 * GIB), **options)


def test_sizes_and_shape_come_from_the_hub_and_weights_stay_there(hub, planned):
    found = planned()
    size = sum(len(data) for name, data in FILES.items() if not name.endswith(".bin"))
    assert found.downloads == {"lab/base@v1": size}
    facts = found.inputs["lab/base@v1"]
    assert (facts.num_bytes, facts.shape.parameters) == (size, 8_190_735_360)
    assert found.problems == [] and found.stages[0].cost.reads == size
    assert hub.count("GET", "/resolve/.*/config.json") == 1
    assert hub.count("GET", "/resolve/.*/model.safetensors") == 0
    told = plan_json(found)
    assert told["downloads"]["files_of"] == {"lab/base@v1": size}
    assert "lab/base@v1 (2 MiB)" in plan_text(found)


def test_what_is_in_the_cache_need_not_come_again(planned):
    snapshot_download("lab/base", revision="v1", ignore_patterns="*.bin")
    found = planned()
    assert found.downloads == {} and found.inputs["lab/base@v1"].where == "hub"
    assert found.inputs["lab/base@v1"].path.is_dir()
    assert "downloads  none" in plan_text(found)


def test_without_a_network_a_plan_still_tells_what_it_can(planned, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = planned()
    assert found.downloads == {"lab/base@v1": None} and found.untimed == ["wide", "more"]
    assert "lab/base@v1: " in plan_text(found) and "downloads  0 MiB" in plan_text(found)


def test_gates_and_revisions_that_do_not_exist_are_problems_of_the_run(hub, planned, tmp_path,
                                                                       monkeypatch):
    hub.add("lab/base", FILES, gated=True)
    hub.connect(monkeypatch, tmp_path, STRANGER)
    (problem,) = planned().problems
    assert problem.startswith("lab/base@v1: ") and "ask for access" in problem
    hub.repos["lab/base"].refs.pop("v1", None)
    hub.connect(monkeypatch, tmp_path)
    (problem,) = planned().problems
    assert "has no revision 'v1'" in problem


def test_a_config_that_no_plan_understands_is_a_problem_and_no_end(hub, planned):
    hub.add("lab/base", {**FILES, "config.json": b'{"model_type": "odd", "hidden_size": [1]}'},
            tag="v1")
    found = planned()
    (problem,) = found.problems
    assert problem.startswith("lab/base@v1: ") and found.downloads["lab/base@v1"] > 2**21


def test_what_a_run_did_with_a_commit_is_known_by_it(planned, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    assert [stage.decision.action for stage in planned(run_dir=run).stages] == ["run", "run"]
    with pytest.raises(RecipeError, match="reads no such input; did you mean 'lab/base@v1'"):
        planned(configs={"lab/base": "x"})
