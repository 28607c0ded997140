"""The plan of a whole recipe: against measured runs, files that are there, and what a run does."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from extend.capacity import GIB, Machine, model_shape, prefill_seconds
from extend.capacity.rates import gpu_rates
from extend.capacity.recompute import choose_recomputed_layers
from extend.cli import main
from extend.errors import CompatibilityError, RecipeError
from extend.model_config import parse_config
from extend.options import STAGES, TrainOptions
from extend.recipe import load_recipe
from extend.recipe_plan import plan as plan_module
from extend.recipe_plan import plan_json, plan_recipe, plan_text
from extend.recipe_plan.evaluation import read_bytes
from extend.recipe_plan.facts import look_at
from extend.recipe_plan.known import known_config
from extend.recipe_plan.stages import COSTS
from extend.run import run

SMOLLM2 = model_shape(parse_config(known_config("SmolLM2-135M")[1], Path("config.json")))
ROOT = Path(__file__).parents[2]


def machine(gpus: int = 8, gpu: str = "h200", **changes) -> Machine:
    return Machine(**{"gpu": gpu, "num_gpus": gpus, "gpu_memory_bytes": int(
        gpu_rates(gpu).memory_gib * GIB)} | changes)


def write(directory: Path, *stages: dict) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "unit", "stages": list(stages)}))
    return path


LONG = {"name": "long", "stage": "train", "model": "Meta-Llama-3-8B", "data": [
    {"kind": "retrieval"}], "schedule": [
        {"length": "64k", "steps": 10, "batch_rows": 32, "lr": 1e-5},
        {"length": "1m", "steps": 5, "batch_rows": 16, "context_parallel": 8, "lr": 1e-5}]}
ADAPTER = {"name": "adapter", "stage": "extract", "base": "Meta-Llama-3-8B", "tuned": "long",
           "rank": 32, "dtype": "bfloat16"}
MERGED = {"name": "merged", "stage": "merge", "adapter": "adapter",
          "target": {"a": "sibling", "b": "org/fine-tune"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("whole"), LONG, ADAPTER, MERGED, {
        "name": "scores", "stage": "eval", "model": "merged-a", "lengths": ["8k", "64k"],
        "tasks": ["passkey"], "depths": 2, "trials": 3, "context_parallel": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield plan_recipe(path, machine=machine())


@pytest.mark.parametrize(("ranks", "seconds", "gib"), [(1, 90.81, 24.7), (2, 44.93, 13.4)])
def test_reading_a_million_tokens_as_measured(ranks, seconds, gib):
    """docs/results/evaluation/prefill-h100.md; attention's share of the rates is from there."""
    found = prefill_seconds(SMOLLM2, 2**20, machine(2, "h100"), gpu_rates("h100"), ranks=ranks)
    assert found == pytest.approx(seconds, rel=0.12)
    assert read_bytes(SMOLLM2, 2**20, ranks) / GIB == pytest.approx(gib, rel=0.03)


def test_reading_a_grid_as_measured():
    """docs/results/evaluation/grid-h100.json: 100 cells one by one, 64.19 s on an H100."""
    lengths = [13107, 26214, 39321, 52428, 65536, 78643, 91750, 104857, 117964, 131072]
    found = sum(10 * prefill_seconds(SMOLLM2, n, machine(1, "h100"), gpu_rates("h100"))
                for n in lengths)
    assert found == pytest.approx(64.19, rel=0.1)


def test_a_recipe_as_it_was_run(tmp_path):
    """README: four H200 took 236 s to train SmolLM2 to 128K and 57 s for each evaluation of 550
    prompts; the adapter at rank 27 has 15.8 MiB.
    """
    path = ROOT / "recipes" / "smollm2-135m-128k.yaml"
    found = plan_recipe(path, machine=machine(4))
    costs = {stage.decision.stage.name: stage.cost for stage in found.stages}
    for name, seconds in (("long", 236), ("eval-long", 57)):
        low, high = (costs[name].seconds * (1 + sign * costs[name].spread) for sign in (-1, 1))
        assert low < seconds < high, f"{name}: {low:.0f} to {high:.0f} s, measured {seconds}"
    assert costs["adapter"].writes / 2**20 == pytest.approx(15.8, rel=0.02)


def test_training_is_that_of_the_planner(whole):
    cost = whole.stages[0].cost
    options = TrainOptions(**{key: value for key, value in LONG.items()
                              if key not in ("name", "stage")})
    config = parse_config(known_config("Meta-Llama-3-8B")[1], Path("config.json"))
    layers = choose_recomputed_layers(config, options, world=8,
                                      device_bytes=machine().gpu_memory_bytes)
    assert [phase.recomputed for phase in cost.phases] == [layers, layers]
    assert cost.seconds == sum(phase.step_seconds * steps
                               for phase, steps in zip(cost.phases, (10, 5), strict=True))
    assert cost.fits and cost.gpu_bytes == max(phase.gpu_bytes for phase in cost.phases)
    # 16 bytes a parameter twice: the checkpoint that stays and the one being written.
    assert cost.scratch == pytest.approx(2 * 12 * 8_030_261_248)
    assert cost.writes == 2 * 8_030_261_248


def test_later_stages_read_what_earlier_ones_write(whole):
    train, adapter, one, _, scores = (stage.cost for stage in whole.stages)
    assert adapter.reads == 2 * train.writes
    assert one.reads == train.writes + adapter.writes and one.writes == train.writes
    assert [s.decision.stage.name for s in whole.stages][2:4] == ["merged-a", "merged-b"]
    assert whole.inputs["sibling"].source == "taken to be like Meta-Llama-3-8B"
    assert scores.gpus == 4 and scores.gpu_bytes == read_bytes(
        whole.inputs["sibling"].shape, 65536, 4)
    # What stays, and the checkpoints of the training, which are gone before merges are written.
    assert whole.disk_bytes == train.writes + train.scratch
    assert whole.gpu_seconds == sum(cost.seconds * cost.gpus for cost in (train, adapter, scores))


def test_what_is_not_here_is_told(whole):
    assert set(whole.missing) == {"Meta-Llama-3-8B", "sibling", "org/fine-tune"}
    assert whole.downloads == {"org/fine-tune": 2 * 8_030_261_248}
    told = plan_json(whole)
    assert json.loads(json.dumps(told)) == told
    assert told["inputs"]["org/fine-tune"]["where"] == "hub"
    assert told["downloads"]["needed_bytes"] == 2 * 8_030_261_248
    assert any("Meta-Llama-3-8B is not there" in line for line in told["problems"])
    text = plan_text(whole)
    assert "unit: 5 stages on 8 x H200 of 140 GiB" in text
    assert "    1M: 5 steps of 16 rows" in text and "downloads  15.0 GiB into" in text
    assert "org/fine-tune: taken to be like Meta-Llama-3-8B" in text


def test_the_text_fits_a_terminal_and_says_once_what_holds_of_several_stages():
    """Lines of 289 characters, and 30 that said the same of other tasks and stages."""
    text = plan_text(plan_recipe(ROOT / "recipes/smollm2-135m-1m.yaml", machine=machine()))
    _, rest = text.split("\ntime  ")
    assert max(map(len, rest.splitlines())) <= 100
    told = " ".join(rest.split())
    assert told.count("answers that are written are not counted") == 1
    assert "eval-shipped, eval-long, eval-merged, eval-record, eval-reverse, eval-dates: " in told
    assert "(ruler-niah_single_1, ruler-niah_multikey_2, ruler-niah_multikey_3, ruler-vt," in told
    assert "1 rows" not in text and "e+0" not in text


def test_what_the_hub_says_names_its_repository_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = plan_recipe(write(tmp_path, {**ADAPTER, "base": "org/base", "tuned": "org/long"}),
                        machine=machine())
    assert [line.count("org/base:") for line in found.problems][:1] == [1]


def test_the_adapter_has_the_size_that_was_published(tmp_path):
    """837 MB: Llama-3-70B-Gradient-1048k-adapter at rank 32, which holds lm_head and embeddings
    as LoRAs too: 9 MB at (128256 + 8192) * 2 of rank 32, without them 828.
    """
    stage = {**ADAPTER, "base": "Meta-Llama-3-70B", "tuned": "elsewhere", "embeddings": False}
    cost = plan_recipe(write(tmp_path, stage), machine=machine()).stages[0].cost
    assert cost.writes == pytest.approx(837e6, rel=0.03)


def test_unknown_shapes_ask_for_a_config(tmp_path):
    path = write(tmp_path, {**LONG, "model": "mine"})
    found = plan_recipe(path, machine=machine())
    assert found.untimed == ["long"] and found.seconds == 0
    assert ("long: not counted: the shape of mine is not known; give --config mine=CONFIG.JSON"
            in plan_text(found))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(known_config("Qwen3-8B")[1]))
    given = ["plan", str(path), "--gpus", "8", "--config", f"mine={config}", "--json"]
    told = json.loads(CliRunner().invoke(main, given).stdout)
    assert told["inputs"]["mine"]["parameters"] == 8_190_735_360
    assert told["stages"][0]["seconds"] > 0 and told["machine"]["assumed"] is False
    with pytest.raises(RecipeError, match="--config your: .* reads no such input; it reads mine"):
        plan_recipe(path, machine=machine(), configs={"your": config})


@pytest.mark.parametrize(("changes", "hardware", "message"), [
    ({"recomputed_layers": "all"}, {"gpu": "h100", "gpus": 2}, "does not fit: .* GiB of a GPU"),
    ({"nproc": 16}, {}, "nproc is 16, but there are 8 GPUs"),
    ({"tensor_parallel": 3}, {}, "8 GPUs do not divide by tensor_parallel 3"),
    ({"schedule": [{"length": 65544, "steps": 1, "lr": 1e-5}]}, {},
     "65544 tokens do not divide over 8 GPUs"),
    ({"host_memory": "500GiB"}, {"host_memory_bytes": GIB}, "GiB of host memory of 1")])
def test_what_does_not_fit(tmp_path, changes, hardware, message):
    found = plan_recipe(write(tmp_path, LONG | changes), machine=machine(**hardware))
    cost = found.stages[0].cost
    assert not cost.fits
    assert re.search(message, cost.notes[0]), cost.notes
    assert found.problems[0] == f"long: {cost.notes[0]}"
    assert "run, does not fit" in plan_text(found)


def test_evaluations_that_do_not_fit(tmp_path):
    stage = {"name": "scores", "stage": "eval", "model": "Meta-Llama-3-8B", "lengths": ["1m"],
             "tasks": ["passkey", {"task": "exact-match", "file": "none.jsonl"}]}
    cost = plan_recipe(write(tmp_path, stage), machine=machine(gpu="h100")).stages[0].cost
    assert not cost.fits and "larger context_parallel" in cost.notes[0]
    assert any("exact-match is not counted" in note for note in cost.notes)
    stage |= {"context_parallel": 16, "server": None}
    cost = plan_recipe(write(tmp_path, stage), machine=machine()).stages[0].cost
    assert cost.notes[0] == "asks for 16 GPUs, but there are 8"
    stage |= {"server": "http://127.0.0.1:1"}
    cost = plan_recipe(write(tmp_path, stage), machine=machine()).stages[0].cost
    assert cost.fits and cost.seconds is None


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "_free", lambda path: 10 * GIB)
    found = plan_recipe(write(tmp_path, LONG), run_dir=tmp_path / "run", machine=machine())
    assert f"{tmp_path / 'run'}: needs 194.4 GiB, but 10.0 are free" in found.problems


def test_what_is_done_is_skipped_and_has_its_true_size(tmp_path):
    """The demo's small models, of which one stage is run for real."""
    base = ROOT / "assets" / "demo" / "base"
    wide = {"name": "wide", "stage": "rescale", "model": str(base), "to": "1k", "method": "ntk"}
    wider = {"name": "wider", "stage": "rescale", "model": "wide", "to": "2k", "method": "ntk"}
    out = tmp_path / "run"
    run(write(tmp_path, wide), out)
    found = plan_recipe(write(tmp_path, wide, wider), run_dir=out, machine=machine())
    assert [stage.decision.action for stage in found.stages] == ["skip", "run"]
    assert found.stages[1].cost.reads == look_at(out / "wide").num_bytes == sum(
        file.stat().st_size for file in (out / "wide").rglob("*"))
    assert found.seconds == found.stages[1].cost.seconds
    assert "wide   rescale  skip" in plan_text(found)


def test_every_stage_has_a_cost():
    assert set(COSTS) <= set(STAGES)
    assert set(STAGES) - set(COSTS) <= {"import", "publish"}, "not counted: tell why"


def test_the_machine_is_found_or_assumed(tmp_path, monkeypatch):
    import torch

    assumed = plan_recipe(write(tmp_path, LONG))
    assert assumed.assumed and assumed.machine.num_gpus == 8
    assert "assumed: no GPU is visible here" in plan_text(assumed)

    class Properties:
        total_memory = 80 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = plan_module.visible_machine()
    assert (found.gpu, found.num_gpus, found.gpu_memory_bytes) == ("h100", 2, 80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    with pytest.raises(CompatibilityError, match=r"rates of a NVIDIA L40S.*nearest --gpu of h200"):
        plan_module.visible_machine()


def test_usage(tmp_path):
    path = write(tmp_path, LONG)
    for flags, message in ((["--to", "8k"], "leave out --to"), (["--rows", "2"], "--rows"),
                           (["--out", "x"], "leave out --out")):
        result = CliRunner().invoke(main, ["plan", str(path), *flags])
        assert result.exit_code == 2 and message in result.output, result.output
    result = CliRunner().invoke(main, ["plan", str(tmp_path), "--to", "8k", "--run", "x"])
    assert result.exit_code == 2 and "belong to a recipe" in result.output
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1 and "no such recipe" in result.output


def test_kin_and_unknown_sizes(tmp_path):
    stage = {"name": "cut", "stage": "cut", "adapter": "somewhere", "rank": 4}
    found = plan_recipe(write(tmp_path, stage), machine=machine())
    assert found.unsized == ["cut"] and "not counted: cut" in plan_text(found)
    assert load_recipe(tmp_path / "recipe.yaml", check_files=False).name == "unit"
