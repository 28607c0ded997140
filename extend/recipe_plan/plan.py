"""What a whole recipe takes: every stage in order, before anything is read or downloaded."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from extend.capacity import GIB, GPUS, Machine, gpu_rates
from extend.decisions import Decision, decide_stages
from extend.errors import CompatibilityError, RecipeError
from extend.manifest import host_memory
from extend.recipe import Recipe, load_recipe
from extend.recipe_inputs import pin_inputs
from extend.recipe_plan.cost import Cost
from extend.recipe_plan.facts import Facts, look_at, look_up_inputs
from extend.recipe_plan.stages import COSTS, unknown_cost
from extend.registry import suggest
from extend.run_record import RUN_RECORD

ASSUMED_GPUS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage: what a run does with it, and what that takes."""

    decision: Decision
    cost: Cost

    @property
    def runs(self) -> bool:
        return self.decision.action != "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipePlan:
    """The plan of a recipe.

    Attributes:
        assumed: whether nobody named the machine and none was found.
        inputs: what it reads from outside, as the recipe calls it.
        run_dir: where it runs, or would.
        free_bytes: of the disk there.
        cache_dir, cache_free_bytes: where downloads go.
    """

    recipe: Recipe
    machine: Machine
    assumed: bool
    inputs: Mapping[str, Facts]
    stages: Sequence[StagePlan]
    run_dir: Path
    free_bytes: int
    cache_dir: Path
    cache_free_bytes: int

    @property
    def seconds(self) -> float:
        """Of all stages whose time is known."""
        return sum(stage.cost.seconds or 0.0 for stage in self.stages if stage.runs)

    @property
    def gpu_seconds(self) -> float:
        return sum((stage.cost.seconds or 0.0) * stage.cost.gpus for stage in self.stages
                   if stage.runs)

    @property
    def untimed(self) -> list[str]:
        return [stage.decision.stage.name for stage in self.stages
                if stage.runs and stage.cost.seconds is None]

    @property
    def disk_bytes(self) -> int:
        """At the fullest moment: outputs that stay, and what a stage needs until it is done."""
        total = peak = 0
        for stage in self.stages:
            if stage.runs:
                total += stage.cost.writes or 0
                peak = max(peak, total + stage.cost.scratch)
        return peak

    @property
    def unsized(self) -> list[str]:
        return [stage.decision.stage.name for stage in self.stages
                if stage.runs and stage.cost.writes is None]

    @property
    def downloads(self) -> dict[str, int | None]:
        """Input -> bytes to download, None where not known."""
        return {value: facts.download_bytes for value, facts in self.inputs.items()
                if facts.where == "hub" and facts.download_bytes != 0}

    @property
    def download_bytes(self) -> int:
        return sum(size or 0 for size in self.downloads.values())

    @property
    def missing(self) -> dict[str, str]:
        """Input -> why it cannot be had."""
        return {value: facts.problem for value, facts in self.inputs.items()
                if facts.where == "missing" or (facts.where == "hub" and facts.problem)}

    @property
    def problems(self) -> list[str]:
        """What would stop the run, as far as a plan can tell."""
        found = [f"{stage.decision.stage.name}: {stage.cost.notes[0]}" for stage in self.stages
                 if stage.runs and not stage.cost.fits]
        found += [problem if problem.startswith(f"{value}: ") else f"{value}: {problem}"
                  for value, problem in self.missing.items()]
        for needed, free, place in (
                (self.disk_bytes, self.free_bytes, self.run_dir),
                (self.download_bytes, self.cache_free_bytes, self.cache_dir)):
            if needed > free:
                found.append(f"{place}: needs {needed / GIB:.1f} GiB, but {free / GIB:.1f} are "
                             "free")
        return found


def plan_recipe(recipe: Path | str, *, run_dir: Path | str | None = None,
                machine: Machine | None = None,
                configs: Mapping[str, Path | str] | None = None,
                overrides: Sequence[str] = ()) -> RecipePlan:
    """Estimate what every stage of a recipe takes; nothing is written, no weights are read.

    Args:
        run_dir: of `extend run --out`; what is done there is skipped, and its disk is looked at.
            None: nothing is done, and the disk is that of the working directory.
        machine: None: the GPUs that are visible, else eight H200 of one host.
        configs: input, as the recipe calls it -> config.json, for models that are not here.
        overrides: `KEY=VALUE`, changes to the recipe; see `extend.recipe_text.set_values`.

    Raises:
        RecipeError: the recipe is not valid, or `configs` names what it does not read.
        CheckpointError: `run_dir` holds something in the place of an output.
        CompatibilityError: a visible GPU of a kind whose rates are not known.
    """
    loaded = load_recipe(recipe, check_files=False, overrides=overrides)
    given, found = dict(configs or {}), machine or visible_machine()
    inputs = look_up_inputs(loaded, given)
    for value in given:
        if value not in inputs:
            raise RecipeError(f"--config {value}: {loaded.path} reads no such input;"
                              f"{suggest(value, inputs)} it reads {', '.join(inputs)}")
    used = found or Machine(gpu="h200", num_gpus=ASSUMED_GPUS,
                            gpu_memory_bytes=int(gpu_rates("h200").memory_gib * GIB))
    place = Path(run_dir or ".").absolute()
    cache = _hub_cache()
    return RecipePlan(
        recipe=loaded, machine=used, assumed=found is None, inputs=inputs,
        stages=_walk(loaded, inputs, used, None if run_dir is None else place), run_dir=place,
        free_bytes=_free(place), cache_dir=cache, cache_free_bytes=_free(cache))


def _walk(recipe: Recipe, inputs: Mapping[str, Facts], machine: Machine,
          run_dir: Path | None) -> list[StagePlan]:
    facts, plans = dict(inputs), []
    decisions = [Decision(stage, "run") for stage in recipe.stages]
    if run_dir is not None and (run_dir / RUN_RECORD).exists():
        decisions = decide_stages(pin_inputs(recipe, fetch=False), run_dir)
    for stage, decision in zip(recipe.stages, decisions, strict=True):
        cost = COSTS.get(stage.kind, unknown_cost)(stage.options, facts.__getitem__, machine)
        facts[stage.name] = cost.output
        if decision.action == "skip":
            done = look_at(run_dir / stage.name)
            facts[stage.name] = replace(cost.output, num_bytes=done.num_bytes, path=done.path,
                                        shape=done.shape or cost.output.shape)
        plans.append(StagePlan(decision=decision, cost=cost))
    return plans


def visible_machine() -> Machine | None:
    """The GPUs of this machine as torch sees them; None without any.

    Raises:
        CompatibilityError: of a kind whose rates are not known.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    gpu = next((key for key in GPUS if key in name.lower()), None)
    if gpu is None:
        raise CompatibilityError(f"the rates of a {name} are not known; give --gpus N and the "
                                 f"nearest --gpu of {', '.join(GPUS)}")
    memory = torch.cuda.get_device_properties(0).total_memory
    return Machine(gpu=gpu, num_gpus=torch.cuda.device_count(), gpu_memory_bytes=memory,
                   host_memory_bytes=host_memory())


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _free(path: Path) -> int:
    """Bytes that are free on the disk where `path` is, or will be."""
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free
