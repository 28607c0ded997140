"""Prompts built again from results alone, of every task there is."""

import json
import shutil
from pathlib import Path

import pytest

from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.evaluate.evaluate import evaluate
from extend.evaluate.frame import Frame
from extend.evaluate.measures.row import describe_prompts, hash_ids
from extend.evaluate.plan import plan_tasks
from extend.evaluate.provenance import describe_run
from extend.evaluate.rebuild import rebuild_prompt
from extend.evaluate.tasks import TASKS
from extend.manifest import describe_inputs, versions
from extend.registry import option_names
from extend.tokenizer import load_tokenizer
from tests.real_tokenizers import load
from tests.tiny_text import make_tokenizer, write_text

GRID = {"lengths": [16384], "depths": [0.5], "trials": 2}
SHORT = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory, model_dir):
    """A file for every option that names one."""
    directory = tmp_path_factory.mktemp("inputs")
    text = write_text(directory / "text.txt", 1200)
    skill = directory / "skill.jsonl"
    skill.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n"
                             for i in range(3)))
    squad, hotpot = directory / "squad.json", directory / "hotpot.json"
    squad.write_text(json.dumps({"data": [{"paragraphs": [
        {"context": f"Town {i} lies by river {i}.", "qas": [
            {"question": f"By which river lies town {i}?", "is_impossible": False,
             "answers": [{"text": f"river {i}"}]}]} for i in range(400)]}]}))
    hotpot.write_text(json.dumps([
        {"question": f"Who rules town {i}?", "answer": f"King {i}", "context": [
            [f"Town {i}", [f"Town {i} has a king, ", f"King {i}."]]]} for i in range(400)]))
    return {"haystack": text, "text": text, "essays": text, "file": skill,
            "reference": model_dir, "ruler-qa_1": squad, "ruler-qa_2": hotpot}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("bytes-bos").save_pretrained(directory)
    return directory


def write_results(out: Path, specs, tokenizer_dir: Path) -> Path:
    """Results as `evaluate` leaves them, of prompts that no model was asked."""
    planned = plan_tasks(specs, **GRID)
    frame = Frame.of(load_tokenizer(tokenizer_dir))
    inputs = {f"{e.name}.{o}": p for e in planned for o, p in e.task.inputs().items()}
    record = {"inputs": {"model": {}, **describe_inputs(inputs)}, "seed": 7,
              "versions": versions()}
    rows = [describe_prompts(cell, entry.task.prompts(frame, cell, 7), 7)
            for entry in planned for cell in entry.cells]
    run = describe_run(record, planned, model=tokenizer_dir, template="auto", **GRID)
    out.write_text(json.dumps({"schema": 1, "model": {"path": str(tokenizer_dir)}, "run": run,
                               "summary": {}, "rows": rows}))
    return out


def spec_of(name, files):
    options = {key: str(files.get(name, files[key]) if key == "file" else files[key])
               for key in option_names(TASKS[name]) if key in files}
    if name == "divergence":
        options["window"] = 256  # the reference's context is short
    return {"task": name, "name": f"my {name}", **options}


# The prompts of lm-eval are made by another package.
@pytest.mark.parametrize("name", [name for name in TASKS if name != "lm-eval"])
def test_prompts_of_every_task_are_built_again(name, files, tokenizer_dir, tmp_path):
    if name == "ruler-vt":  # its example must fit into 500 tokens
        tokenizer_dir = tmp_path / "words"
        load("smollm2").save_pretrained(tokenizer_dir)
    path = write_results(tmp_path / "r.json", [spec_of(name, files)], tokenizer_dir)
    rows = json.loads(path.read_text())["rows"]
    for number, row in enumerate(rows):
        for trial in {0, len(row["trial_sha256"]) - 1}:
            found = rebuild_prompt(path, number, trial)
            assert hash_ids(found.ids) == found.sha256 == row["trial_sha256"][trial]
            assert found.cell["control"] == row["control"] and found.changed == ()


def test_a_row_of_an_evaluation_is_what_the_model_read(model_dir, text_file, tmp_path):
    path = evaluate(model_dir, tmp_path / "eval", seed=3, lengths=[300], depths=[0.0, 0.75],
                    trials=2, tasks=[{"task": "passkey-text", "haystack": text_file, "name": "a.b"},
                                     "passkey"])
    rows = json.loads(path.read_text())["rows"]
    found = rebuild_prompt(path.parent, 1, 1)
    assert (found.cell["name"], found.cell["depth"], len(found.ids)) == ("a.b", 0.75, 300)
    assert found.text.endswith(rows[1]["trials"][1]["answer"])
    assert found.details["answer"] == rows[1]["trials"][1]["answer"]
    assert found.text.startswith("<bos>There is an important info")
    assert rebuild_prompt(path, 4).cell == {"task": "passkey", "name": "passkey", "length": 300,
                                            "depth": 0.0, "control": None, "seed": 3}
    assert rebuild_prompt(path, 6).cell["control"] == "no-needle"


def test_prompts_put_to_the_base_are_built_again(model_dir, tmp_path):
    path = evaluate(model_dir, tmp_path / "eval", tasks=["passkey"], base=model_dir, lengths=[300],
                    depths=1, trials=1)
    found = rebuild_prompt(path, 3)
    assert found.cell["control"] == "base" and len(found.ids) == 512


@pytest.fixture
def results(files, tokenizer_dir, tmp_path):
    """Results with copies of what they were made of, which a test may change."""
    shutil.copytree(tokenizer_dir, tmp_path / "model")
    shutil.copy(files["haystack"], tmp_path / "hay.txt")
    specs = [{"task": "passkey-text", "haystack": str(tmp_path / "hay.txt")}, "passkey"]
    return write_results(tmp_path / "r.json", specs, tmp_path / "model")


def test_a_changed_haystack_is_named_with_both_hashes(results, tmp_path):
    recorded = json.loads(results.read_text())["run"]["inputs"]["passkey-text.haystack"]["sha256"]
    write_text(tmp_path / "hay.txt", 1200, seed=1)
    now = describe_inputs({"x": tmp_path / "hay.txt"})["x"]["sha256"]
    with pytest.raises(CompatibilityError, match="row 0 trial 1 is another prompt") as caught:
        rebuild_prompt(results, 0, 1)
    assert (f"the passkey-text.haystack {tmp_path}/hay.txt has sha256 {now[:SHORT]} instead of "
            f"{recorded[:SHORT]}") in str(caught.value)
    assert rebuild_prompt(results, 3).changed == ()  # no business of another task's


def test_a_haystack_too_short_now_is_named_too(results, tmp_path):
    write_text(tmp_path / "hay.txt", 3)
    with pytest.raises(CompatibilityError, match="too few for a passage.*passkey-text.haystack"):
        rebuild_prompt(results, 0)


def test_a_missing_haystack_may_be_elsewhere(results, tmp_path):
    (tmp_path / "hay.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(CheckpointError, match="--input passkey-text.haystack=PATH"):
        rebuild_prompt(results, 0)
    found = rebuild_prompt(results, 0, inputs={"passkey-text.haystack": tmp_path / "moved.txt"})
    assert found.changed == ()
    with pytest.raises(RecipeError, match="input 'hay': the results have passkey-text.haystack"):
        rebuild_prompt(results, 0, inputs={"hay": "x"})


def test_another_tokenizer_is_named_with_both_hashes(results, tmp_path):
    recorded = json.loads(results.read_text())["run"]["tokenizer"]["files"]["tokenizer.json"]
    make_tokenizer("bytes").save_pretrained(tmp_path / "other")
    with pytest.raises(CompatibilityError, match="is another prompt") as caught:
        rebuild_prompt(results, 3, model=tmp_path / "other")
    assert "other/tokenizer.json has sha256 " in str(caught.value)
    assert f"instead of {recorded[:SHORT]}" in str(caught.value)


def test_a_change_that_does_not_reach_the_ids_is_only_noted(results, tmp_path):
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 9}))
    changed, = rebuild_prompt(results, 3).changed
    assert changed.startswith(f"{config} has sha256 ")


def test_tampered_results_are_not_believed(results):
    data = json.loads(results.read_text())
    data["rows"][3]["trial_sha256"][0] = "0" * 64
    data["run"]["versions"]["transformers"] = "0.1"
    results.write_text(json.dumps(data))
    with pytest.raises(CompatibilityError, match=r"sha256 [0-9a-f]{16} instead of 0{16}; its "
                                                 r"tokenizer and inputs are those.*transformers"):
        rebuild_prompt(results, 3)
    data["run"]["depths"] = [0.25]
    results.write_text(json.dumps(data))
    with pytest.raises(CompatibilityError, match=r"row 3 of passkey has depth 0.5"):
        rebuild_prompt(results, 3)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((9,), RecipeError, "row 9 is not there; it has rows 0 to 5"),
    ((-1,), RecipeError, "row -1 is not there"),
    ((0, 2), RecipeError, r"row 0 \(passkey-text\) has trials 0 to 1, not 2")])
def test_rows_that_are_not_there(results, arguments, error, message):
    with pytest.raises(error, match=message):
        rebuild_prompt(results, *arguments)


@pytest.mark.parametrize("key", ["run", "trial_sha256"])
def test_older_results_say_that_they_cannot(results, key):
    data = json.loads(results.read_text())
    data.pop(key, None)
    data["rows"][0].pop(key, None)
    results.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="evaluate again with this version"):
        rebuild_prompt(results, 0)


def test_command_prints_text_ids_or_json(results, tmp_path):
    from click.testing import CliRunner

    from extend.cli import main

    invoke = CliRunner().invoke
    found = rebuild_prompt(results, 3)
    text = invoke(main, ["eval-prompt", str(results), "--row", "3"])
    assert text.output == found.text + "\n" and text.exit_code == 0
    ids = invoke(main, ["eval-prompt", str(results), "--row", "3", "--ids"])
    assert json.loads(ids.output) == found.ids
    data = json.loads(invoke(main, ["eval-prompt", str(results), "--row", "3", "--json"]).output)
    assert data["sha256"] == found.sha256 and data["ids"] == found.ids
    (tmp_path / "hay.txt").write_text("other\n")
    failed = invoke(main, ["eval-prompt", str(results), "--row", "0"])
    assert failed.exit_code == 1 and "passkey-text.haystack" in failed.stderr
