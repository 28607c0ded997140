"""Every shipped recipe loads and can be planned, and the demo's inputs are shipped too."""

import functools
import re
from pathlib import Path

import pytest

from extend.capacity import GIB, Machine
from extend.option_types import parse_length
from extend.recipe import load_recipe
from extend.recipe_plan import RecipePlan, plan_recipe, plan_text
from extend.rope.presets import PRESETS

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
IDS = [path.stem for path in RECIPES]
PLANNED = [path for path in RECIPES if "Planned (`extend plan" in path.read_text()
           or "Planned on" in path.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_recipe_loads(path: Path):
    recipe = load_recipe(path, check_files=path.stem == "demo")
    assert recipe.name == path.stem
    assert f"extend run recipes/{path.name} --out runs/{path.stem}" in path.read_text()
    assert "Hardware: " in path.read_text() or path.stem in ("demo", "smollm2-135m-128k")


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_recipe_fits_where_it_says(path: Path):
    """On the hardware of its first comment nothing is too large, and all shapes are known."""
    found = plan_of(path)
    assert found.untimed == [] and found.unsized == []
    for stage in found.stages:
        assert stage.cost.fits, f"{stage.decision.stage.name}: {stage.cost.notes[0]}"
    assert plan_text(found).startswith(f"{path.stem}: {len(found.stages)} stages on ")


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_the_time_and_memory_in_its_comment_are_those_of_the_plan(path: Path):
    comment = " ".join(line.lstrip("# ") for line in path.read_text().split("name:")[0].split(
        "\n") if "Planned" in path.read_text())
    found = plan_of(path)
    peak = max(stage.cost.gpu_bytes or 0 for stage in found.stages) / GIB
    told = re.search(r"([\d.]+) GiB of (?:each|the) GPU", comment)
    if told:
        assert float(told[1]) == pytest.approx(peak, rel=0.02)
    hours = re.search(r"([\d,]+) GPU hours", comment)
    if hours:
        assert float(hours[1].replace(",", "")) == pytest.approx(found.gpu_seconds / 3600, rel=0.03)
    assert told or hours or path.stem == "adapter-only"


@functools.cache
def plan_of(path: Path) -> RecipePlan:
    """Without asking the Hub."""
    one = re.search(r"Hardware: one (H200|GPU)", path.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return plan_recipe(path, machine=Machine(gpu="h200", num_gpus=1 if one else 8,
                                                 gpu_memory_bytes=int(139.8 * GIB)))


def test_thetas_are_the_published_ones():
    """Gradient's cards, Qwen2.5-1M's report, ProLong's scripts."""
    def thetas(name: str) -> dict[int, float]:
        (path,) = (path for path in RECIPES if path.stem == name)
        (train,) = (stage.options for stage in load_recipe(path, check_files=False).stages
                    if stage.kind == "train")
        return {phase.length: (phase.rope or train.rope).options.get("rope_theta")
                for phase in train.schedule}

    gradient = {"64k": 15296098, "256k": 207112184, "512k": 1062356830, "1m": 2804339835}
    gradient = {parse_length(length): theta for length, theta in gradient.items()}
    assert thetas("llama3-8b-1m") == gradient
    assert thetas("llama3-8b-256k") == {length: gradient[length] for length in (2**16, 2**18)}
    assert thetas("qwen3-8b-256k") == {2**16: 1e6, 2**17: 5e6, 2**18: 1e7}
    assert list(thetas("prolong-8b-512k")) == list(PRESETS["prolong"].thetas) == [2**16, 2**19]
    assert PRESETS["prolong"].thetas == {2**16: 8e6, 2**19: 1.28e8}


def test_prolong_trains_on_the_published_mix():
    (path,) = (path for path in RECIPES if path.stem == "prolong-8b-512k")
    train = load_recipe(path, check_files=False).stages[0].options
    for phase, tokens in zip(train.schedule, (20.97e9, 20.97e9), strict=True):
        assert sum(phase.mix.values()) == pytest.approx(1)
        assert phase.length * phase.batch_rows * phase.steps == pytest.approx(tokens, rel=1e-3)
    assert [phase.length * phase.batch_rows for phase in train.schedule] == [2**22, 2**23]
