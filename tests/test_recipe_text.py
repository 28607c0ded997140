"""Numbers as people write them, and values changed with --set."""

import copy

import pytest
import yaml

from extend.errors import RecipeError
from extend.recipe import check_recipe, load_recipe
from extend.recipe_text import RecipeLoader, set_values

DATA = {"name": "r", "stages": [
    {"name": "base", "tasks": (shared := [{"task": "passkey", "trials": 5}])},
    {"name": "long", "tasks": shared, "schedule": [{"lr": 1e-5}, {"lr": 2e-5, "rope": None}]},
    {"name": "two", "tasks": [{"name": "x"}, {"name": "x"}]}]}


@pytest.mark.parametrize(("text", "value"), [
    ("2.8e9", 2.8e9), ("28e8", 2.8e9), ("1e-5", 1e-5), ("-1E+3", -1000.0), ("1_000", 1000),
    ("1_000.5", 1000.5), (".5", 0.5), ("5.", 5.0), ("2_8e0_1", "2_8e0_1"), ("0x1F", 31),
    ("010", 10), ("08", 8), ("1:30", "1:30"), ("2026-01-02", "2026-01-02"), ("8k", "8k"),
    ("1e5m", "1e5m"), ("-", "-"), ("e5", "e5"), ("'1e5'", "1e5"), ("yes", True), ("~", None),
    ("-.inf", float("-inf")), ("+12", 12), ("1.2.3", "1.2.3")])
def test_values(text, value):
    found = yaml.load(f"- {text}" if text != "-" else "'-'", Loader=RecipeLoader)
    found = found[0] if text != "-" else found
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("override", "path", "value"), [
    ("seed=3", ("seed",), 3),
    ("long.schedule.1.lr=3e-6", ("stages", 1, "schedule", 1, "lr"), 3e-6),
    ("stages.1.schedule.0.lr=1", ("stages", 1, "schedule", 0, "lr"), 1),
    ("stages.long.tasks.0.trials=2", ("stages", 1, "tasks", 0, "trials"), 2),
    ("long.schedule.1.rope.method=ntk", ("stages", 1, "schedule", 1, "rope", "method"), "ntk"),
    ("base.lengths=[8k, 1_000]", ("stages", 0, "lengths"), ["8k", 1000]),
    ("base.note=a=b", ("stages", 0, "note"), "a=b"),
    ("base.chunk=", ("stages", 0, "chunk"), None)])
def test_a_value_is_set_there_and_nowhere_else(override, path, value):
    before = copy.deepcopy(DATA)
    expected = copy.deepcopy({**DATA, "stages": [copy.deepcopy(stage) for stage in DATA["stages"]]})
    place = expected
    for part in path[:-1]:
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = place[part]
    place[path[-1]] = value
    found, places, refused = set_values(DATA, [override])
    assert (found, places, refused) == (expected, {path: override}, [])
    assert before == DATA


@pytest.mark.parametrize(("override", "message"), [
    ("seed", "write KEY=VALUE"), ("=1", "write KEY=VALUE"), ("a..b=1", "write KEY=VALUE"),
    ("lnog.lr=1", "'lnog' is neither a stage nor a key of the recipe; did you mean 'long'?"),
    ("long.schedule.2.lr=1", "stages.1.schedule has no place 2; there are 2, from 0 on"),
    ("long.schedule.-1.lr=1", "'-1' no place in it; write a number from 0 to 1"),
    ("stages.lnog.lr=1", "did you mean 'long'? write a number from 0 to 2, or one of base, long"),
    ("long.schedule.0.lr.x=1", "stages.1.schedule.0.lr is 1e-05, which has no 'x'"),
    ("two.tasks.x.n=1", "2 members of stages.2.tasks are called 'x'"),
    ("long.a=[1", "the value is not valid YAML"), ("long.a=&a [*a]", "alias *a inside"),
    ("long.a={b: 1, b: 2}", "key 'b' is given twice"),
    ("long.a=!!python/name:os.system", "the tag tag:yaml.org,2002:python/name:os.system")])
def test_what_cannot_be_set(override, message):
    data, places, refused = set_values(DATA, [override, "seed=1"])
    assert message in refused[0][1] and len(refused) == 1
    assert data == {**DATA, "seed": 1} and places == {("seed",): "seed=1"}


RECIPE = """\
name: two
stages:
  - name: scores
    stage: eval
    model: base
    lengths: [1k]
    tasks: &tasks [{task: passkey, trails: 3}]
  - {name: again, stage: eval, model: base, lengths: [1k], tasks: *tasks}
  - name: init
    stage: rescale
    <<: &same {model: base, to: 1kb, sliding_window: rfuse}
    method: theta
    options: {rope_theta: 2.8e9}
  - {name: init, stage: rescale, <<: *same}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    (tmp_path / "base").mkdir()
    return path


def test_anchors_are_reported_where_they_are_written_and_once(recipe):
    _, problems = check_recipe(recipe)
    told = [(p.where.rpartition(":")[2], p.message) for p in problems]
    assert [line for line, _ in told] == ["7", "11", "11", "14"]
    assert "unknown option 'trails'; did you mean 'trials'?" in told[0][1]
    assert told[1][1].startswith("sliding_window: Input should be 'refuse', 'drop' or 'keep' (it is"
                                 " 'rfuse'); did you mean 'refuse'?")
    assert told[2][1].startswith("to: '1kb' is not a length")


def test_a_recipe_with_set_values(recipe):
    good = ["scores.tasks.0={task: passkey, trials: 3}", "again.tasks=[passkey]",
            "init.to=2k", "init.sliding_window=keep", "stages.3={name: last, stage: rescale, "
            "model: init, to: 1_000, method: ntk}"]
    recipe.write_text(RECIPE.replace("  - {name: init,", "  - {name: other,"))
    loaded = load_recipe(recipe, overrides=good)
    assert [stage.name for stage in loaded.stages] == ["scores", "again", "init", "last"]
    assert loaded.stages[2].options.options == {"rope_theta": 2.8e9}
    assert (loaded.stages[2].options.to, loaded.stages[3].options.to) == (2048, 1000)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides=[*good, "init.method=nkt", "seed=x", "lsat.to=1k"])
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        "--set lsat.to=1k", "--set init.method=nkt", "--set seed=x"]
