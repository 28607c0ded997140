"""Models and adapters of the Hub as inputs of stages, against a hub on the loopback interface."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

import extend
from extend.cli import main
from extend.errors import CheckpointError, HubError, RecipeError, SpaceError
from extend.inputs import HubInput, local_path, pin
from extend.manifest import MANIFEST_NAME
from extend.options import STAGES
from extend.recipe import load_recipe
from extend.recipe_inputs import input_path, pin_inputs
from extend.run import run
from tests.hub import STRANGER

RECIPE = """\
name: hub
stages:
  - {name: one, stage: rescale, model: lab/base, to: 1k, method: ntk}
  - {name: two, stage: rescale, model: one, from_len: 128, to: 2k, method: ntk}
  - {name: pinned, stage: rescale, model: lab/base@v1, to: 4k, method: ntk}
  - {name: other, stage: rescale, model: lab/target, to: 1k, method: ntk}
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


@pytest.fixture
def lab(hub, llama):
    """The hub with three models, of which each also has weights that nobody may read."""
    for name in ("base", "tuned", "target"):
        hub.add(f"lab/{name}", {**files_of(getattr(llama, name)), "pytorch_model.bin": b"pickle",
                                "README.md": "---\nlicense: mit\n---\n"}, tag="v1")
    return hub


def shas(hub) -> dict[str, str]:
    return {name.partition("/")[2]: repo.refs["main"] for name, repo in hub.repos.items()}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_stages_read_the_hub_as_they_read_a_disk(lab, llama, tmp_path):
    here = extend.extract(llama.base, llama.tuned, tmp_path / "here", rank=4)
    found = extend.extract("lab/base@v1", "lab/tuned", tmp_path / "found", rank=4)
    for name in ("adapter_model.safetensors", "extend_sidecar.safetensors"):
        assert (found / name).read_bytes() == (here / name).read_bytes()
    assert not any(r.path.endswith(".bin") for r in lab.requests)
    sha = shas(lab)
    inputs = read(found / MANIFEST_NAME)["inputs"]
    for role, entry in inputs.items():
        hash_ = entry.pop("sha256")
        assert len(hash_) == 64
        assert entry == {"path": f"lab/{role}@{sha[role]}", "repo": f"lab/{role}",
                         "revision": sha[role]}
        assert read(found / "extend_sidecar.json")["sources"][role] == {
            "path": f"lab/{role}@{sha[role]}", "sha256": hash_}
    config = read(found / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("lab/base", sha["base"])

    lab.add("lab/adapter", found)
    merged = extend.merge("lab/adapter", "lab/target", tmp_path / "merged")
    expected = extend.merge(here, llama.target, tmp_path / "expected")
    assert (merged / "model.safetensors").read_bytes() == \
        (expected / "model.safetensors").read_bytes()
    for directory in (found, merged):
        for name, data in files_of(directory).items():
            assert b"snapshots" not in data and str(tmp_path).encode() not in data, name
    local_path("lab/base@v1")
    fetched = [r.path for r in lab.requests if r.method == "GET" and "/resolve/" in r.path]
    assert len(fetched) == len(set(fetched)) > 4 * 4


CALLS = {
    "plan": lambda hub, out: extend.plan(hub, target_len=1024),
    "search": lambda hub, out: extend.search(hub, out, target_len=1024, text="t"),
    "import_gguf": lambda hub, out: extend.import_gguf(f"{hub}:m.gguf", out),
    "rescale": lambda hub, out: extend.rescale(hub, out, target_len=1024),
    "train": lambda hub, out: extend.train(STAGES["train"](
        model=hub, schedule=[{"length": 64, "steps": 1, "lr": 1}],
        data=[{"kind": "retrieval"}]), out),
    "extract": lambda hub, out: extend.extract(hub, hub, out),
    "cut": lambda hub, out: extend.cut(hub, out, rank=1),
    "adapter_report": lambda hub, out: extend.adapter_report(hub, out),
    "merge": lambda hub, out: extend.merge([hub], "t", out),
    "fit": lambda hub, out: extend.fit(STAGES["fit"](
        target=hub, adapter="a", prompts="p"), out),
    "repair": lambda hub, out: extend.repair(STAGES["repair"](
        merged=hub, reference="r", prompts="p"), out),
    "lineage": lambda hub, out: extend.lineage("t", hub),
    "evaluate": lambda hub, out: extend.evaluate(
        "m", out, tasks=[{"task": "divergence", "text": "t", "reference": hub}]),
    "doctor": lambda hub, out: extend.doctor(hub)}


def test_every_function_asks_the_hub_first(hub, tmp_path):
    """All but those of recipes, which are tested elsewhere, and those that read results."""
    assert set(CALLS) == set(extend._STAGES) - {"run", "plan_recipe", "report", "publish"}
    for call in CALLS.values():
        with pytest.raises(HubError, match="^lab/nowhere: there is no such directory here, and no "
                                           "such repository on the Hub that this user may see"):
            call("lab/nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_and_doctor_leave_weights_alone(lab):
    result = CliRunner().invoke(main, ["plan", "lab/base@v1", "--to", "1k", "--json"])
    assert result.exit_code == 0, result.output
    assert lab.count("GET", "/resolve/") == lab.count("GET", "/config.json") == 1
    assert extend.doctor("lab/base").ok
    assert lab.count("GET", "safetensors") == 0
    with pytest.raises(RecipeError, match="lab/base is on the Hub, so it cannot be changed"):
        extend.doctor("lab/base", fix=True)


def why(text: str, error: type[Exception] = HubError) -> str:
    with pytest.raises(error) as told:
        local_path(text)
    return str(told.value)


def test_what_cannot_be_had(lab, monkeypatch):
    lab.add("lab/gated", {"config.json": "{}"}, gated=True)
    lab.add("lab/hidden", {"config.json": "{}"}, private=True)
    lab.add("lab/pickle", {"config.json": "{}", "pytorch_model.bin": b"x"})
    told = why("lab/base@mian")
    assert "lab/base@mian: the repository has no revision 'mian'; did you mean 'main'?" in told
    assert "it has main, v1, or give a commit" in told
    assert "only as pytorch_model.bin, which can run any code" in why("lab/pickle", CheckpointError)
    assert "has no file 'configs.json'; did you mean" in why("lab/base:configs.json")
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert "no such repository on the Hub that this user may see" in why("lab/hidden")
    assert "lab/gated is gated, and this user has not been let in" in why("lab/gated")
    assert lab.count("GET", "/resolve/") == 0


def test_a_repository_that_was_renamed(lab, caplog):
    lab.moved["lab/old"] = "lab/base"
    found = pin(HubInput.parse("lab/old"))
    assert found.id.repo == "lab/base"
    assert "lab/old: is called lab/base on the Hub now" in caplog.text
    assert (found.fetch() / "model.safetensors").is_file()


def test_the_cache_is_all_there_is_offline(lab, monkeypatch):
    sha = shas(lab)
    folder = local_path("lab/base")
    asked = len(lab.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("lab/base", "lab/base@main", f"lab/base@{sha['base']}"):
        assert local_path(name) == folder
    told = why("lab/base@v1")
    assert "holds no revision 'v1' of that repository while HF_HUB_OFFLINE is set" in told
    assert told.endswith("with `hf download lab/base --revision v1`")
    assert why("lab/tuned").endswith("with `hf download lab/tuned`")
    (folder / "model.safetensors").unlink()
    told = why("lab/base")
    assert "it has no model.safetensors" in told
    assert "the cache may hold only a part of it" in told
    assert len(lab.requests) == asked


def test_offline_a_branch_means_what_it_meant_when_it_was_last_asked_for(lab, monkeypatch):
    local_path("lab/base")
    files = lab.repos["lab/base"].files
    new = lab.add("lab/base", {**files, "config.json": files["config.json"] + b" "})
    assert local_path(f"lab/base@{new}").name == new  # all of it is here, by the commit alone
    folder = local_path("lab/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert folder.name == new and local_path("lab/base") == folder


def test_a_hub_that_does_not_answer(lab, caplog):
    sha = shas(lab)["base"]
    folder = local_path("lab/base")
    lab.fail("GET", "/api/models/", times=100, status=500)
    assert "the Hub answered 500" in why("lab/base")
    assert local_path(f"lab/base@{sha}") == folder
    assert "all of that commit is in the cache, which is used" in caplog.text
    assert "the Hub answered 500" in why(f"lab/tuned@{shas(lab)['tuned']}")


def test_a_download_that_is_cut_goes_on(lab, llama):
    lab.fail("GET", "model.safetensors$", status=0, after=1000)
    folder = local_path("lab/base")
    assert (folder / "model.safetensors").read_bytes() == \
        (llama.base / "model.safetensors").read_bytes()


def test_a_disk_that_is_too_small(lab, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert "1,000 are free; free space, or set HF_HOME to another disk" in why(
        "lab/base", SpaceError)


class Project:
    def __init__(self, root: Path, caplog):
        self.recipe, self.out, self.caplog = root / "recipe.yaml", root / "out", caplog
        self.recipe.write_text(RECIPE)

    def run(self) -> list[str]:
        """The stages that were not skipped."""
        self.caplog.clear()
        with self.caplog.at_level(logging.INFO, logger="extend.run"):
            run(self.recipe, self.out)
        told = [r.getMessage() for r in self.caplog.records if r.name == "extend.run"]
        return [line.split()[1] for line in told if not line.endswith("done already, skipped")]

    def revision(self, stage: str) -> str:
        return read(self.out / stage / MANIFEST_NAME)["inputs"]["model"]["revision"]


def test_a_recipe_is_pinned_and_skipped_by_commit(lab, tmp_path, caplog):
    project = Project(tmp_path, caplog)
    before = shas(lab)
    assert project.run() == ["one", "two", "pinned", "other"]
    assert project.revision("one") == before["base"]
    assert project.run() == []
    lab.add("lab/base", {"notes.txt": "main moved, and v1 did not"})
    assert project.run() == ["one"]  # what it writes is as before
    assert project.revision("one") == shas(lab)["base"] != before["base"]
    assert project.revision("pinned") == before["base"]


def test_a_model_whose_tokenizer_is_taken_first_is_fetched_whole(lab, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("""\
stages:
  - {name: imported, stage: import, file: x.gguf, tokenizer: lab/base}
  - {name: one, stage: rescale, model: lab/base, to: 1k, method: ntk}
""")
    pin_inputs(load_recipe(path, check_files=False))
    assert pin(HubInput.parse("lab/base")).missing == []


def test_all_that_a_recipe_lacks_is_told_before_anything_runs(lab, tmp_path, caplog):
    lab.add("lab/target", {"config.json": "{}"}, gated=True)
    del lab.repos["lab/base"]
    project = Project(tmp_path, caplog)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecipeError) as told:
        patch.setenv("HF_TOKEN", STRANGER)
        project.run()
    lines = str(told.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["one.model", "pinned.model", "other.model"]
    assert "no such repository" in lines[0] and "gated" in lines[2]
    assert lab.count("GET", "/resolve/") == 0 and not any(project.out.iterdir())


def test_a_directory_beside_the_recipe_wins(lab, tmp_path, caplog):
    (tmp_path / "lab" / "base").mkdir(parents=True)
    found = pin_inputs(load_recipe(Project(tmp_path, caplog).recipe))
    models = [stage.options.model for stage in found.stages]
    assert models[0] == "lab/base"
    assert input_path(found, models[0]) == str(tmp_path / "lab" / "base")
    sha = shas(lab)
    assert models[2:] == [f"lab/base@{sha['base']}", f"lab/target@{sha['target']}"]
    assert input_path(found, models[3]) == models[3]
