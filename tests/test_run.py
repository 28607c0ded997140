"""What `run` does again, what it leaves alone, and what it says about it."""

import importlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from extend.adapter import extract
from extend.cli import main
from extend.decisions import decide
from extend.errors import CheckpointError, RecipeError
from extend.manifest import MANIFEST_NAME, hash_content, hash_files
from extend.merge import merge
from extend.model_config import read_config
from extend.output import write_json
from extend.rope import rescale
from extend.run import run
from extend.run_page import PAGE_NAME
from extend.run_record import PLAN_NAME, RECIPE_RECORD, RUN_RECORD
from tests.adapter_format.tiny_models import make_models
from tests.page.structure import Structure

run_module = importlib.import_module("extend.run")  # `extend.run` is the function

STAGES = ["adapter", "merged", "wide", "wider"]
RECORDS = [RUN_RECORD, RECIPE_RECORD, PLAN_NAME, PAGE_NAME]
RECIPE = """\
name: unit
stages:
  - {name: adapter, stage: extract, base: models/base, tuned: models/tuned, rank: 4}
  - {name: merged, stage: merge, adapter: adapter, target: models/target}
  - {name: wide, stage: rescale, model: models/base, to: 1k, method: ntk}
  - {name: wider, stage: rescale, model: wide, to: 4k, method: ntk}
"""


class Project:
    """A recipe with its inputs and its output; `run` tells what each stage did."""

    def __init__(self, root: Path, caplog: pytest.LogCaptureFixture):
        self.root, self.out, self._caplog = root, root / "out", caplog
        self.recipe = root / "recipe.yaml"

    def write(self, old: str = "", new: str = "") -> None:
        assert old in RECIPE
        self.recipe.write_text(RECIPE.replace(old, new, 1))

    @property
    def caught(self) -> str:
        return self._caplog.text

    def run(self) -> dict[str, str]:
        """Stage -> `new`, `skipped`, or the reason why it ran again."""
        self._caplog.clear()
        foretold = {one.stage.name: one for one in decide(self.recipe, self.out)}
        with self._caplog.at_level(logging.INFO, logger="extend.run"):
            run(self.recipe, self.out)
        told = {}
        for record in self._caplog.records:
            if record.name == "extend.run" and record.levelno == logging.INFO:
                label, _, what = record.getMessage().partition(": ")
                told[label.split()[1]] = what.removeprefix("again, because ") or "new"
        told = {name: "skipped" if what == "done already, skipped" else what
                for name, what in told.items()}
        for name, what in told.items():
            one = foretold[name]
            expected = {"run": "new", "resume": "new", "skip": "skipped",
                        "again": one.reason.removeprefix("because "), "open": what}
            assert expected[one.action] == what, f"{name}: foretold was {one}"
        return told

    def manifest(self, stage: str) -> dict:
        return json.loads((self.out / stage / MANIFEST_NAME).read_text())

    def hashes(self) -> dict[str, str]:
        return {name: hash_content(self.out / name) for name in STAGES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project that has run once; tests work on copies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("finished")
    make_models(root / "models", "llama", torch.float32)
    (root / "recipe.yaml").write_text(RECIPE)
    run(root / "recipe.yaml", root / "out")
    yield root
    torch.set_num_threads(threads)


@pytest.fixture
def project(finished, tmp_path, caplog) -> Project:
    # An adapter tells the path of its base, so that one must not move.
    root = tmp_path / "project"
    for part in ("out", "models/target"):
        shutil.copytree(finished / part, root / part)
    for name in ("base", "tuned"):
        (root / "models" / name).symlink_to(finished / "models" / name)
    shutil.copyfile(finished / "recipe.yaml", root / "recipe.yaml")
    return Project(root, caplog)


@pytest.fixture
def fresh(project) -> Project:
    """The same, not yet run."""
    shutil.rmtree(project.out)
    return project


def all_but(changes: dict[str, str]) -> dict[str, str]:
    return dict.fromkeys(STAGES, "skipped") | changes


CHANGED = "its options or inputs have changed"


def test_stages_run_in_order_with_references_resolved(fresh):
    told = fresh.run()
    assert list(told.items()) == [(name, "new") for name in STAGES]
    assert fresh.manifest("merged")["inputs"]["adapter"]["path"] == str(fresh.out / "adapter")
    assert fresh.manifest("merged")["inputs"]["target"]["path"] == str(
        fresh.root / "models" / "target")
    assert sorted(os.listdir(fresh.out)) == sorted([*STAGES, *RECORDS])


def test_a_run_gives_what_its_stages_give_by_hand(project, tmp_path):
    models, by_hand = project.root / "models", tmp_path / "by-hand"
    extract(models / "base", models / "tuned", by_hand / "adapter", rank=4)
    merge(by_hand / "adapter", models / "target", by_hand / "merged")
    rescale(models / "base", by_hand / "wide", target_len=1024, method="ntk")
    rescale(by_hand / "wide", by_hand / "wider", target_len=4096, method="ntk")
    for name in ("merged", "wide", "wider"):
        assert hash_files(project.out / name) == hash_files(by_hand / name)


def test_a_recipe_may_start_again_from_a_native_length(fresh):
    native = read_config(fresh.root / "models" / "base").max_position_embeddings
    recipe = RECIPE.replace("to: 1k, method: ntk", "to: 1k, method: yarn").replace(
        "to: 4k, method: ntk", f"to: 4k, method: yarn, from_len: {native}")
    fresh.recipe.write_text(recipe)
    fresh.run()
    rope = read_config(fresh.out / "wider").rope
    assert (rope.original_len, rope.scaling["factor"]) == (native, 4096 / native)


def test_a_second_run_skips_everything_and_says_so(fresh):
    fresh.run()
    before = {path: path.stat().st_mtime_ns for path in fresh.out.rglob("*")}
    assert fresh.run() == all_but({})
    assert {path: path.stat().st_mtime_ns for path in fresh.out.rglob("*")} == before


def test_a_run_may_move(project):
    assert project.run() == all_but({})  # the fixture has copied it from elsewhere


def test_a_changed_option_runs_its_stage_and_what_follows_from_it(project):
    before = project.hashes()
    project.write("rank: 4", "rank: 8")
    assert project.run() == all_but({"adapter": CHANGED, "merged": CHANGED})
    after = project.hashes()
    assert {name for name in STAGES if before[name] != after[name]} == {"adapter", "merged"}
    assert project.manifest("adapter")["options"]["rank"] == 8
    assert project.run() == all_but({})


def foretold(project) -> dict[str, tuple[str, str]]:
    return {one.stage.name: (one.action, one.reason) for one in
            decide(project.recipe, project.out)}


def test_what_a_run_would_do_is_told_and_nothing_is_written(fresh, monkeypatch):
    project = fresh
    assert foretold(project) == dict.fromkeys(STAGES, ("run", ""))
    assert not project.out.exists()
    project.run()
    before = {path: path.stat().st_mtime_ns for path in project.out.rglob("*")}
    project.write("rank: 4", "rank: 8")
    done = ("skip", "done already")
    assert foretold(project) == {
        "adapter": ("again", f"because {CHANGED}"),
        "merged": ("open", "again, unless adapter comes out as before"),
        "wide": done, "wider": done}
    assert {path: path.stat().st_mtime_ns for path in project.out.rglob("*")} == before
    with monkeypatch.context() as patch:
        kill(patch, "extract", after_it_is_done=False)
        shutil.rmtree(project.out / "adapter")
        with pytest.raises(Killed):
            project.run()
    (project.out / "adapter.state").mkdir()
    assert foretold(project)["adapter"] == ("resume", "from where it was interrupted")


def test_the_command_tells_what_a_run_would_do(project):
    project.write("to: 4k", "to: 8k")
    given = ["run", str(project.recipe), "--out", str(project.out), "--dry-run"]
    told = CliRunner().invoke(main, given)
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines() == [
        "[1/4] adapter (extract): skip, done already", "[2/4] merged (merge): skip, done already",
        "[3/4] wide (rescale): skip, done already",
        f"[4/4] wider (rescale): again, because {CHANGED}"]
    told = json.loads(CliRunner().invoke(main, [*given, "--json"]).stdout)
    assert told["stages"][3] == {"name": "wider", "stage": "rescale", "action": "again",
                                 "reason": f"because {CHANGED}"}


def test_a_change_without_effect_stops_there(project):
    """The model has no sliding window, so the output is the same, and with it all that follows."""
    project.write("to: 1k, method: ntk", "to: 1k, method: ntk, sliding_window: drop")
    assert project.run() == all_but({"wide": CHANGED})


def test_names_and_comments_of_a_recipe_do_not_matter(project):
    project.write("name: unit", "# The same.\nname: other\nseed: 0")
    assert project.run() == all_but({})


def test_a_changed_input_file_runs_what_reads_it(project):
    (project.root / "models" / "target" / "chat_template.jinja").write_text("new")
    assert project.run() == all_but({"merged": CHANGED})
    assert (project.out / "merged" / "chat_template.jinja").read_text() == "new"


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: os.truncate(path, path.stat().st_size - 1)])
def test_a_damaged_output_is_made_again(damage, project):
    before = project.hashes()
    damage(project.out / "adapter" / "adapter_model.safetensors")
    assert project.run() == all_but(
        {"adapter": "its output adapter_model.safetensors is missing or was changed"})
    assert project.hashes() == before


def test_a_deleted_output_is_made_again(project):
    before = project.hashes()
    shutil.rmtree(project.out / "wide")
    assert project.run() == all_but({"wide": "new"})
    assert project.hashes() == before


def test_a_deleted_record_is_told_and_nothing_is_replaced(project):
    (project.out / RUN_RECORD).unlink()
    before = project.hashes()
    with pytest.raises(CheckpointError, match="adapter: exists already, but run.json"):
        project.run()
    assert project.hashes() == before


def test_what_is_not_an_output_is_not_replaced(fresh):
    (fresh.out / "wide").mkdir(parents=True)
    (fresh.out / "wide" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="wide: exists already"):
        fresh.run()
    assert (fresh.out / "wide" / "thesis.txt").read_text() == "precious"


def test_a_failing_stage_is_named_and_all_outputs_stay(project):
    before = project.hashes()
    project.write("rank: 4", "rank: 999")
    with pytest.raises(RecipeError, match="^adapter: rank is 999, larger than every matrix"):
        project.run()
    assert project.hashes() == before
    project.write()
    assert project.run() == all_but({})  # the old options are those of the old output again


def test_a_fixed_recipe_goes_on_from_the_failing_stage(fresh):
    fresh.write("target: models/target}", "target: models/target, weight: .nan}")
    with pytest.raises(RecipeError, match="^merged: weight is nan"):
        fresh.run()
    assert sorted(os.listdir(fresh.out)) == sorted(["adapter", *RECORDS])
    fresh.write()
    assert fresh.run() == {"adapter": "skipped", "merged": "new", "wide": "new", "wider": "new"}


def test_the_page_tells_what_failed_and_what_must_be_looked_at_again(project):
    """The outputs of before are still there, but not what this run has made."""
    def states() -> dict[str, str]:
        entries = json.loads((project.out / RUN_RECORD).read_text())
        return {name: entries[name]["state"] for name in STAGES}

    page = project.out / PAGE_NAME
    assert states() == dict.fromkeys(STAGES, "done")
    assert "4 of 4" in page.read_text() and "not whole" not in page.read_text()
    project.write("rank: 4", "rank: 999")
    with pytest.raises(RecipeError):
        project.run()
    assert states() == {"adapter": "failed", "merged": "unchecked", "wide": "unchecked",
                        "wider": "unchecked"}
    Structure(page.read_text()).check(project.out)
    assert "This run is not whole" in page.read_text()
    assert "rank is 999, larger than every matrix" in page.read_text()
    assert "rank: 999" in page.read_text()  # the recipe
    project.write()
    project.run()
    assert states() == dict.fromkeys(STAGES, "done")
    assert "4 of 4" in page.read_text() and "rank is 999" not in page.read_text()


def test_a_page_that_cannot_be_written_stops_no_run(fresh):
    fresh.out.mkdir()
    (fresh.out / PAGE_NAME).write_text("<p>somebody else's")
    fresh.run()
    assert "was not written by `extend run`" in fresh.caught
    assert (fresh.out / PAGE_NAME).read_text() == "<p>somebody else's"
    assert (fresh.out / "wider").is_dir()


class Killed(BaseException):
    """Stands for a signal that nothing can catch: no clean-up of `run` may depend on it."""


def kill(monkeypatch, kind: str, *, after_it_is_done: bool) -> None:
    runner = run_module.RUNNERS[kind]

    def killed(options, out):
        if after_it_is_done:
            runner(options, out)
        raise Killed

    monkeypatch.setitem(run_module.RUNNERS, kind, killed)


def test_killed_before_the_stage_wrote_anything(project, monkeypatch):
    """The record knows the new options, the directory holds the output of the old ones."""
    before = project.hashes()
    project.write("rank: 4", "rank: 8")
    with monkeypatch.context() as patch:
        kill(patch, "extract", after_it_is_done=False)
        with pytest.raises(Killed):
            project.run()
        with pytest.raises(Killed):  # once more: the record must not take the old output for new
            project.run()
    assert project.hashes() == before
    assert project.run() == all_but({"adapter": CHANGED, "merged": CHANGED})
    assert project.manifest("adapter")["options"]["rank"] == 8


def test_killed_right_after_the_stage_was_done(project, monkeypatch):
    project.write("rank: 4", "rank: 8")
    with monkeypatch.context() as patch:
        kill(patch, "extract", after_it_is_done=True)
        with pytest.raises(Killed):
            project.run()
    assert project.run() == all_but({"merged": CHANGED})


def test_an_old_output_is_not_taken_for_new_after_a_detour(project, monkeypatch):
    """A -> B killed -> A is skipped -> B runs."""
    with monkeypatch.context() as patch:
        kill(patch, "extract", after_it_is_done=False)
        project.write("rank: 4", "rank: 8")
        with pytest.raises(Killed):
            project.run()
    project.write()
    assert project.run() == all_but({})
    project.write("rank: 4", "rank: 8")
    assert project.run() == all_but({"adapter": CHANGED, "merged": CHANGED})


def test_unfinished_work_is_kept_for_the_same_options_only(project, monkeypatch):
    state = project.out / "adapter.state"
    with monkeypatch.context() as patch:
        kill(patch, "extract", after_it_is_done=False)
        project.write("rank: 4", "rank: 8")
        with pytest.raises(Killed):
            project.run()
        state.mkdir()
        with pytest.raises(Killed):
            project.run()
        assert state.is_dir()
        project.write("rank: 4", "rank: 6")
        with pytest.raises(Killed):
            project.run()
    assert not state.exists()


def test_leftovers_of_a_stage_that_is_done_go(project):
    leftovers = [project.out / name for name in ("wide.state", ".wide.rows", ".wide.old")]
    for path in leftovers:
        path.mkdir()
    assert project.run() == all_but({})
    assert not any(path.exists() for path in leftovers)


def test_out_that_cannot_be_made(project):
    project.out = project.root / "recipe.yaml"
    with pytest.raises(CheckpointError, match=r"recipe\.yaml: no such directory can be made"):
        project.run()


@pytest.mark.parametrize("name, left", [
    (RECIPE_RECORD, []), (RUN_RECORD, [PLAN_NAME, RECIPE_RECORD])])
def test_record_that_cannot_be_written(name, left, fresh, monkeypatch):
    def full(path, data):
        if path.name == name:
            raise OSError(28, "No space left on device")
        write_json(path, data)

    monkeypatch.setattr("extend.run_record.write_json", full)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be written \(No space left"):
        fresh.run()
    assert sorted(os.listdir(fresh.out)) == left


def test_several_processes_of_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="a launcher started 2 of it; start it alone"):
        run(tmp_path / "recipe.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()
