import json
import subprocess
import sys

import pytest

from extend.errors import RecipeError
from extend.evaluate import check_tasks
from extend.evaluate import plan as plan_module
from extend.evaluate.plan import (
    expand,
    plan_tasks,
    spread_depths,
    spread_options,
    with_base,
)


def plan(tasks, **grid):
    return plan_tasks(tasks, **{"lengths": (), "depths": 3, "trials": 2, **grid})


def test_grid_of_the_run_and_of_a_task():
    tasks = ["passkey", {"task": "passkey", "name": "far", "lengths": ["2k", 4096],
                         "depths": [1, 0], "trials": 7, "controls": False}]
    near, far = plan(tasks, lengths=["1k", 512])
    assert [(c.length, c.depth, c.trials) for c in near.cells] == [
        (512, 0.0, 2), (512, 0.5, 2), (512, 1.0, 2), (1024, 0.0, 2), (1024, 0.5, 2), (1024, 1.0, 2),
        (512, None, 2)]
    assert [(c.name, c.length, c.depth, c.trials) for c in far.cells] == [
        ("far", 2048, 0.0, 7), ("far", 2048, 1.0, 7), ("far", 4096, 0.0, 7), ("far", 4096, 1.0, 7)]
    keys = [c.key for entry in (near, far) for c in entry.cells]
    assert len(set(keys)) == len(keys)


def test_tasks_without_a_grid(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    skill, loss = plan([{"task": "exact-match", "file": tmp_path / "x.jsonl"},
                        {"task": "loss", "text": "books", "window": "1k", "max_tokens": "8k"}])
    assert skill.task.inputs() == {"file": str(tmp_path / "x.jsonl")}
    assert loss.task.window == 1024 and loss.cells[0].trials == 8


def test_depths():
    assert spread_depths(1, "x") == [0.5]
    assert spread_depths(5, "x") == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert spread_depths(10, "x")[3] == 0.333333
    assert spread_depths([1, 0.25], "x") == [0.25, 1.0]


@pytest.mark.parametrize(("task", "message"), [
    ("paskey", "tasks: unknown 'paskey'; did you mean 'passkey'"),
    ({"name": "x"}, "neither a name nor a mapping with the key `task`"),
    ({"task": "passkey", "depth": 3}, "unknown option 'depth'; did you mean 'depths'"),
    ({"task": "passkey-text"}, "task passkey-text: missing option haystack"),
    ({"task": "passkey-text", "haystack": 3}, "task passkey-text: haystack: 3 is not text"),
    ({"task": "passkey", "controls": "no"}, "controls: 'no' is not true or false"),
    ({"task": "loss", "text": "x", "window": "long"}, "window: 'long' is not a length"),
    ({"task": "loss", "text": "x", "lengths": [1024]}, "loss has no lengths; leave the key out"),
    ({"task": "exact-match", "file": "x", "limit": 0}, "limit: 0 is not a length"),
    ({"task": "passkey", "name": " "}, "name ' ' of passkey is not a text"),
])
def test_wrong_tasks_are_named(task, message):
    with pytest.raises(RecipeError, match=message):
        check_tasks([task])


@pytest.mark.parametrize(("tasks", "grid", "message"), [
    (["passkey"], {}, r"passkey: lengths: a list of lengths in tokens is needed, it is \(\)"),
    (["passkey"], {"lengths": "4k"}, "lengths: a list"),
    (["passkey"], {"lengths": [0]}, "0 is not a length"),
    (["passkey"], {"lengths": [512], "depths": 0}, "depths: 0 is not a number of at least 1"),
    (["passkey"], {"lengths": [512], "depths": [1.5]}, "depths: 1.5 is not between 0 and 1"),
    (["passkey"], {"lengths": [512], "trials": True}, "trials: True is not"),
    (["passkey", {"task": "passkey"}], {"lengths": [512]}, "two are called 'passkey'"),
    ([], {}, "a list of at least one task"),
    ("passkey", {}, "a list of at least one task is needed, it is 'passkey'"),
])
def test_wrong_grids_are_named(tasks, grid, message):
    with pytest.raises(RecipeError, match=message):
        plan(tasks, **grid)


def test_planning_imports_no_torch():
    code = ("import sys, extend.evaluate, extend.evaluate.tasks\n"
            "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_options_go_to_the_tasks_that_have_them():
    specs = spread_options(["passkey", "passkey-text", "loss"], {
        "haystack": "books", "controls": False, "loss.window": 256, "passkey.trials": 2})
    assert specs == [{"task": "passkey", "controls": False, "trials": 2},
                     {"task": "passkey-text", "haystack": "books", "controls": False},
                     {"task": "loss", "window": 256}]


@pytest.mark.parametrize(("option", "message"), [
    ("haystak", "did you mean 'haystack'"), ("loss.haystack", "none of passkey-text, loss has it")])
def test_an_option_that_no_task_has_is_an_error(option, message):
    with pytest.raises(RecipeError, match=message):
        spread_options(["passkey-text", "loss"], {option: 1})


def test_a_group_stands_for_its_tasks(monkeypatch):
    monkeypatch.setitem(plan_module.GROUPS, "two", ("passkey", "loss"))
    assert expand(["two", {"task": "two", "text": "x"}, {"task": "passkey", "name": "a"}]) == [
        {"task": "passkey"}, {"task": "loss"}, {"task": "passkey", "text": "x"},
        {"task": "loss", "text": "x"}, {"task": "passkey", "name": "a"}]
    assert [spec["task"] for spec in spread_options(["two"], {})] == ["passkey", "loss"]


def test_the_base_is_asked_at_its_native_length_alone():
    planned = with_base(plan_tasks(["passkey"], lengths=[2048, 4096], depths=2, trials=3), 1024)
    added = [cell for cell in planned[0].cells if cell.control == "base"]
    assert [(c.length, c.depth, c.trials) for c in added] == [(1024, 0.0, 3), (1024, 1.0, 3)]
    assert len(planned[0].cells) == 2 * 2 + 1 + 2
    assert len({cell.key for cell in planned[0].cells}) == 7
