"""Which stages led to an output, and what its card calls the models they read."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import extend
from extend.cli import main
from extend.errors import CheckpointError, HubError, RecipeError
from extend.hub import HubId, check_repo_id
from extend.manifest import hash_content, recorded_content
from extend.publish.files import public_recipe
from extend.publish.naming import Names, name_all
from extend.publish.provenance import find, read_output, read_run
from tests.hub import READER, Hub
from tests.publish.conftest import RECIPE

SHA = "ab" * 20


def test_recorded_content_is_that_of_the_files(run: Path):
    for name in ("rescaled", "long", "adapter", "eval-base"):
        assert recorded_content(read_output(run / name).manifest) == hash_content(run / name)


def test_stages_are_found_by_content_also_after_a_move(run: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    for directory in (run, moved):
        found, (adapter,) = find(directory, None)
        assert [o.name for o in found.ancestors(adapter)] == ["rescaled", "long", "adapter"]
        merged = next(o for o in found.stages if o.name == "merged")
        assert [o.name for o in found.ancestors(merged)] == ["rescaled", "long", "adapter",
                                                             "merged"]
        assert [(s.role, Path(s.path).name) for s in found.sources(found.ancestors(merged))] == [
            ("model", "base"), ("data[0]", "text.jsonl"), ("target", "sibling")]
    names = name_all(found, [adapter], base_id="a/b", ids={})
    assert names.apply(f"{run}/long, {run}/eval-base/results.json, {run.parent}/base/x, "
                       f"{run.parent}/texts/text.jsonl, {run}-2, {run.parent}/base-2") == (
        f"long, eval-base/results.json, a/b/x, text.jsonl, {run}-2, {run.parent}/base-2")


def test_a_source_may_be_written_with_dots(run: Path):
    (run / "adapter" / "logs").mkdir()
    assert find(run / "adapter" / "logs" / "..", None)[1] == find(run / "adapter", None)[1]
    (run / "adapter" / "logs").rmdir()


def test_models_must_have_a_name_on_the_hub(run: Path):
    found, (merged,) = find(run / "merged", None)
    with pytest.raises(RecipeError) as refused:
        name_all(found, [merged], base_id=None, ids={})
    assert f"adapter was made from the base {run.parent / 'base'}, a local path" in str(
        refused.value)
    assert "add --base-id ORG/NAME[@COMMIT] --id sibling=ORG/NAME[@COMMIT]" in str(refused.value)
    with pytest.raises(RecipeError, match="the id of other: no manifest of the run names such"):
        name_all(found, [merged], base_id="a/b", ids={"other": "c/d"})
    named = name_all(found, [merged], base_id=f"a/b@{SHA}", ids={"sibling": "c/d"})
    assert set(named.ids.values()) == {HubId("a/b", SHA), HubId("c/d")}


def test_names_that_manifests_or_the_cache_tell(run: Path, tmp_path: Path):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    manifest = json.loads((tmp_path / "adapter/manifest.json").read_text())
    cache = f"/x/hub/models--maker--base/snapshots/{SHA}"
    manifest["inputs"]["base"]["path"] = cache
    manifest["inputs"]["tuned"] |= {"repo": "maker/long", "revision": "v2"}
    (tmp_path / "adapter/manifest.json").write_text(json.dumps(manifest))
    found, (adapter,) = find(tmp_path / "adapter", None)
    names = name_all(found, [adapter], base_id=None, ids={})
    assert names.ids[cache] == HubId("maker/base", SHA)
    assert HubId("maker/long", "v2") in names.ids.values()
    assert names.apply(f'"path": "{cache}"') == '"path": "maker/base"'


def test_an_adapter_that_was_cut_elsewhere(run: Path, tmp_path: Path):
    """Its manifest knows the adapter before, and only its config the base."""
    shutil.copytree(run / "adapter", tmp_path / "cut")
    manifest = json.loads((tmp_path / "cut/manifest.json").read_text())
    manifest |= {"stage": "cut", "inputs": {"adapter": {"path": "/x/adapter", "sha256": "0"}}}
    (tmp_path / "cut/manifest.json").write_text(json.dumps(manifest))
    found, outputs = find(tmp_path / "cut", None)
    with pytest.raises(RecipeError, match=f"cut was made from the base {run.parent}/base, a local"):
        name_all(found, outputs, base_id=None, ids={})
    path = tmp_path / "cut/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "base_model_name_or_path": "maker/base", "revision": SHA}))
    names = name_all(found, outputs, base_id=None, ids={})
    assert names.ids == {"maker/base": HubId("maker/base", SHA)}


def test_a_merge_of_an_adapter_from_the_hub(run: Path, tmp_path: Path):
    shutil.copytree(run / "merged", tmp_path / "alone")
    path = tmp_path / "alone/manifest.json"
    manifest = json.loads(path.read_text().replace(str(run / "adapter"), f"lab/long@{SHA}"))
    manifest["inputs"]["adapter"] |= {"repo": "lab/long", "revision": SHA}
    path.write_text(json.dumps(manifest))
    card = extend.publish(tmp_path / "alone", "lab/x", ids={"sibling": "c/d"}, dry_run=True,
                          results={}).card
    assert "base_model:\n- c/d\n- lab/long\n" in card
    assert f"adapter lab/long@{SHA}, target c/d" in card
    assert "| | after |\n| --- | --- |\n| longest context, tokens | 128 |\n" in card


def test_what_was_read_from_the_hub_keeps_its_name(run: Path, tmp_path: Path):
    shutil.copytree(run / "rescaled", tmp_path / "rescaled")
    path = tmp_path / "rescaled/manifest.json"
    manifest, read = json.loads(path.read_text()), f"maker/base@{SHA}"
    manifest["inputs"]["model"] |= {"path": read, "repo": "maker/base", "revision": SHA}
    path.write_text(json.dumps(manifest))
    found, outputs = find(tmp_path / "rescaled", None)
    names = name_all(found, outputs, base_id=None, ids={})
    assert names.apply(f'"path": "{read}"') == f'"path": "{read}"'
    assert names.of(read) == read and read not in names.local


def test_a_path_of_one_word_is_renamed_only_where_a_path_is_meant():
    names = Names({}, {"base": "a/b", "x/base": "c/d"})
    assert names.apply('{"base": "base", "path": "base", "rule": "base"}, the base, x/base') == (
        '{"base": "a/b", "path": "a/b", "rule": "base"}, the base, c/d')
    assert names.apply("vllm serve base --x\n--model-path base -y") == (
        "vllm serve a/b --x\n--model-path a/b -y")


def test_the_recipe_keeps_its_comments_and_loses_its_paths(run: Path):
    found, (adapter,) = find(run, None)
    names = name_all(found, [adapter], base_id="a/b", ids={"sibling": "c/d"})
    assert public_recipe(found.recipe, names) == RECIPE.replace("./base", "a/b").replace(
        "base: base", "base: a/b").replace("texts/text.jsonl", "text.jsonl").replace(
        "target: sibling", "target: c/d")


def test_what_an_alias_repeats_is_renamed_once():
    """Each alias cut the text after its anchor's paths again, by what the path was longer."""
    text = ("stages:\n  - {name: a, tasks: &tasks [{task: loss, text: ../far/away/a.jsonl}]}\n"
            "  # said of b\n  - {name: b, tasks: *tasks}\n  - {name: c, tasks: *tasks}\n")
    names = Names({}, {"/far/away/a.jsonl": "a.jsonl"})
    assert public_recipe({"text": text, "path": "/home/recipe.yaml"}, names) == text.replace(
        "../far/away/", "")


def test_what_of_a_run_is_published(run: Path, tmp_path: Path):
    assert [o.name for o in find(run, "model")[1]] == ["merged"]
    assert [o.name for o in find(run, "results")[1]] == ["eval-base", "eval-merged"]
    with pytest.raises(RecipeError, match="holds model, and adapter was to be published"):
        find(run / "merged", "adapter")
    with pytest.raises(CheckpointError, match="has no manifest.json"):
        find(run.parent / "base", None)
    with pytest.raises(CheckpointError, match="no such directory"):
        find(tmp_path / "none", None)
    for name in ("one", "two"):
        shutil.copytree(run / "adapter", tmp_path / "several" / name)
        path = tmp_path / "several" / name / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["outputs"]["report.json"]["sha256"] = name
        path.write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="holds 2 outputs of kind adapter .*: one, two; give one"):
        find(tmp_path / "several", None)
    assert len(read_run(tmp_path / "several").stages) == 2


def test_an_output_that_was_changed_since_is_refused(run: Path, tmp_path: Path, hub):
    hub.add("a/b", {"README.md": "# Base"})
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run/adapter/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: has the sha256"):
        extend.publish(tmp_path / "run/adapter", "lab/x", base_id="a/b", license="mit", results={})
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: is missing"):
        extend.publish(tmp_path / "run/adapter", "lab/x", base_id="a/b", dry_run=True, results={})
    assert set(hub.repos) == {"a/b"}


@pytest.mark.parametrize("name", ["long", "a/b/c", "a/b--c", "a/b.git", "-a/b", "a/b c", "a/", "",
                                  "a/" + "b" * 97])
def test_names_that_the_hub_would_not_take(name: str):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with pytest.raises(RecipeError, match="is no name on the Hub"):
        check_repo_id(name)
    if "/" in name and name != "a/":  # the client lets a name without an owner through
        with pytest.raises(HFValidationError):
            validate_repo_id(name)


@pytest.mark.parametrize("name", ["a/b", "Org-1/name_2.3-x"])
def test_names_that_the_hub_takes(name: str):
    check_repo_id(name)
    assert HubId.parse(f"{name}@{SHA}") == HubId(name, SHA)


def test_as_a_stage_of_a_recipe(run: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""\
stages:
  - {{name: hub, stage: publish, source: {run / "adapter"}, to: lab/long, base_id: a/b@{SHA},
     license: mit, results: {{}}, dry_run: true}}
""")
    out = extend.run(recipe, tmp_path / "out") / "hub"
    record = json.loads((out / "published.json").read_text())
    assert (record["repo"], record["commit"], record["dry_run"]) == ("lab/long", None, True)
    assert f"revision = 'a/b', '{SHA}'" in (out / "README.md").read_text()
    assert f"--revision {SHA}" in (out / "README.md").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["options"]["license"] == "mit"
    assert manifest["inputs"]["source"]["sha256"] == hash_content(run / "adapter")


def test_a_run_asks_first_whether_it_may_publish(run: Path, tmp_path: Path, hub: Hub, monkeypatch):
    hub.connect(monkeypatch, tmp_path, READER)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""\
stages:
  - {{name: rescaled, stage: rescale, model: {run.parent / "base"}, to: 128}}
  - {{name: hub, stage: publish, source: rescaled, to: lab/long, base_id: a/b}}
""")
    with pytest.raises(HubError, match="the token of reader may only read"):
        extend.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "rescaled").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"license": "Apache 2.0"}, "is no identifier of the Hub's"),
    ({"license": "other"}, "has the name None and the link None; give both"),
    ({"licence": "mit"}, "publish: licence: Extra inputs are not permitted; it takes source, to")])
def test_options_that_are_wrong(run: Path, options: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        extend.publish(run / "adapter", "lab/x", base_id="a/b", dry_run=True, results={}, **options)


def test_the_command(run: Path):
    args = ["publish", str(run / "adapter"), "--to", "lab/x", "--base-id", "a/b", "--dry-run",
            "--no-results", "--license", "mit"]
    told = CliRunner().invoke(main, args)
    assert told.exit_code == 0
    assert "would go to lab/x, a private repository of a model:" in told.stdout
    assert "bytes; nothing was sent" in told.stdout and "base_model: a/b" in told.stdout
    record = json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)
    assert record["dry_run"] and record["private"] and record["card"].startswith("---\n")
    assert {"name": "adapter_model.safetensors", "bytes": 18304, "origin": "as it is"} in record[
        "files"]
    wrong = CliRunner().invoke(main, [*args, "--id", "sibling"])
    assert wrong.exit_code == 1 and "write each --id once as PATH=ORG/NAME" in wrong.stderr


def test_an_adapter_without_a_sidecar_says_so(run: Path, tmp_path: Path):
    plain = tmp_path / "plain"
    shutil.copytree(run / "adapter", plain)
    manifest = json.loads((plain / "manifest.json").read_text())
    for name in ("extend_sidecar.json", "extend_sidecar.safetensors", "serving.json", "SERVING.md"):
        (plain / name).unlink()
        del manifest["outputs"][name]
    (plain / "manifest.json").write_text(json.dumps(manifest))
    card = extend.publish(plain, "lab/x", base_id="a/b", dry_run=True, results={}).card
    assert "it does not say for which RoPE it was made" in card
    assert "## Load it" not in card and "## Context and RoPE" not in card
