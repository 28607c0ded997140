"""A recipe's problems are found before anything runs, all at once, each with its line."""

from pathlib import Path

import pytest

from extend.errors import RecipeError
from extend.options import input_paths, resolve_inputs
from extend.recipe import load_recipe

GOOD = """\
name: small
seed: 7
stages:
  - name: rescaled
    stage: rescale
    model: base
    to: 1k
    method: ntk
  - name: long
    stage: train
    model: rescaled
    schedule:
      - {length: 1k, steps: 2, lr: 1e-4}
    data:
      - {kind: retrieval, facts: [1]}
  - name: scores
    stage: eval
    model: long
    lengths: [1k]
    tasks: [passkey, {task: exact-match, file: skill.jsonl}]
"""


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "skill.jsonl").write_text("")

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_a_good_recipe_loads(write):
    recipe = load_recipe(write(GOOD))
    assert [(s.name, s.kind) for s in recipe.stages] == [
        ("rescaled", "rescale"), ("long", "train"), ("scores", "eval")]
    assert recipe.stages[1].options.schedule[0].lr == 1e-4
    assert recipe.stages[1].options.seed == 7
    assert [v for _, v in input_paths(recipe.stages[2].options)] == ["long", "skill.jsonl"]


def test_resonance_goes_with_every_method(write):
    text = GOOD.replace("method: ntk", "method: ntk\n    options: {resonance: true}")
    assert load_recipe(write(text)).stages[0].options.options == {"resonance": True}


def test_inputs_resolve_everywhere(write):
    options = load_recipe(write(GOOD)).stages[2].options
    resolved = resolve_inputs(options, lambda value: f"/x/{value}")
    assert resolved.model == "/x/long"
    assert resolved.tasks[1]["file"] == "/x/skill.jsonl"


@pytest.mark.parametrize(("old", "new", "message"), [
    ("name: small", "nmae: small", "recipe.yaml:1: unknown key 'nmae'; did you mean 'name'?"),
    ("stage: rescale", "stage: rescal", "recipe.yaml:5: stage: unknown 'rescal'; did you mean 're"),
    ("method: ntk", "methd: ntk", "recipe.yaml:8: methd: unknown key; did you mean 'method'?"),
    ("method: ntk", "method: nkt", "recipe.yaml:8: method: unknown 'nkt'; did you mean 'ntk'?"),
    ("model: rescaled", "model: rescaled\n    rope: {method: nkt}",
     "recipe.yaml:12: method: unknown 'nkt'; did you mean 'ntk'?"),
    ("model: rescaled", "model: rescaled\n    rope: atuo",
     "recipe.yaml:12: rope: 'atuo' is no RoPE; write auto, or a mapping"),
    ("method: ntk", "options: {beta: 1}",
     "critical: unknown option 'beta'; it accepts no options"),
    ("to: 1k", "to: 1kb", "recipe.yaml:7: to: '1kb' is not a length in tokens"),
    ("steps: 2,", "stepz: 2,", "stepz: unknown key; did you mean 'steps'?"),
    ("facts: [1]", "fact: [1]", "fact: unknown key; did you mean 'facts'?"),
    ("kind: retrieval, facts: [1]", "kind: retreival", "recipe.yaml:15: data.0"),
    ("model: base", "model: bse", "bse does not exist, and no earlier stage is called 'bse'"),
    ("model: rescaled", "model: scores", "recipe.yaml:11: model: stage 'scores' does not come bef"),
    ("model: long", "model: lng", "no earlier stage is called 'lng'; did you mean 'long'?"),
    ("name: scores", "name: long", "recipe.yaml:16: name: 'long' is taken by an earlier stage"),
    ("name: scores", "name: a/b", "name: 'a/b' is not a name of letters, digits, - and _"),
    ("[passkey,", "[pass-key,", "unknown 'pass-key'; did you mean 'passkey'?"),
    ("exact-match, file", "exact-match, fiel", "unknown option 'fiel'; did you mean 'file'?"),
    ("name: small", "name: [small", "recipe.yaml:2: not valid YAML"),
    ("seed: 7", "seed: 7\nseed: 8", "recipe.yaml:3: key 'seed' is given twice"),
    ("    model: rescaled\n", "", "recipe.yaml:9: model: is missing"),
])
def test_each_problem_has_its_message_and_line(write, old, new, message):
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD.replace(old, new, 1)))
    assert message in str(caught.value)


def test_a_path_is_told_as_a_path_and_not_as_a_stage(write):
    path = write(GOOD.replace("model: base", "model: a/../gone/x", 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).endswith(f": model: {path.parent}/gone/x does not exist")


def test_all_problems_are_reported_at_once(write):
    text = GOOD.replace("method: ntk", "method: nkt\n    too: 1")
    text = text.replace("model: long", "model: lng")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["8", "9", "19"]


@pytest.mark.parametrize("text", ["", "- a", "stages: []", "stages: {a: 1}", "stages: [1]",
                                  "&a [*a]", "!!python/object/apply:os.system ['true']"])
def test_what_is_no_recipe_is_refused(write, text):
    with pytest.raises(RecipeError):
        load_recipe(write(text))


def test_an_alias_repeats_a_block(write):
    text = GOOD.replace("tasks: [passkey,", "tasks: &tasks [passkey,") + (
        "  - {name: again, stage: eval, model: long, lengths: [2k], tasks: *tasks}\n")
    stages = load_recipe(write(text)).stages
    assert stages[3].options.tasks == stages[2].options.tasks


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


MERGES = """\
name: adapted
stages:
  - {name: adapter, stage: extract, base: base, tuned: base}
  - name: merged
    stage: merge
    adapter: adapter
    target: TARGETS
  - {name: scores, stage: eval, model: merged-b-2, lengths: [1k], tasks: [passkey]}
"""


@pytest.mark.parametrize("targets", ["[base, org/b.2@main]", "{base: base, b-2: org/b.2@main}"])
def test_a_merge_into_several_targets_is_a_stage_for_each(write, targets):
    recipe = load_recipe(write(MERGES.replace("TARGETS", targets)), check_files=False)
    merges = [stage for stage in recipe.stages if stage.kind == "merge"]
    assert [(s.name, s.options.target) for s in merges] == [
        ("merged-base", "base"), ("merged-b-2", "org/b.2@main")]
    assert {s.options.adapter for s in merges} == {"adapter"}
    assert [s.name for s in recipe.stages][-1] == "scores"


@pytest.mark.parametrize(("targets", "message"), [
    ("[]", "recipe.yaml:4: merge: there are no targets"),
    ("[a/base, b/base]", "two targets are called 'base'; write them as label: path"),
    ("{'b 2': base}", "'b 2' is no label"),
    ("{adapter: base}\n  - {name: merged-adapter, stage: cut, adapter: adapter, rank: 4}",
     "recipe.yaml:8: name: 'merged-adapter' is taken by an earlier stage"),
    ("[base]", "recipe.yaml:8: model: .*'merged-b-2'; did you mean 'merged-base'"),
    ("{b-2: bse}", r"recipe.yaml:7: target.b-2: .*bse does not exist")])
def test_problems_with_several_targets(write, targets, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(MERGES.replace("TARGETS", targets)))
