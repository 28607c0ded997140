"""The sizes of the experiment of scripts/long_trials.py. Imports no torch."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from extend.documents import list_files

from .plan import ROOT, Costs, Phase, Plan, Rope, make_ropes

GENTLE = "yarn-1.1"  # with a smaller attention factor than yarn's own
PROSE = "prose.txt"
FAR = "far-text"  # the held-out texts together, docs first: neither is 1M tokens long by itself


@dataclass(frozen=True)
class Level:
    """Defaults.

    Attributes:
        make: the plan.
        ramp: the turns between which by-parts moves pairs.
        own: what the recipe of this model takes, by name; without, by-parts stands for it.
        search: a search's record.
    """

    make: Callable[[], Plan]
    ramp: tuple[float, float]
    own: Mapping[str, Rope] = field(default_factory=dict)
    search: Path | None = None


def _smollm2() -> Plan:
    text = ROOT / "data/text"
    return Plan(
        model=ROOT / "data/smollm2-135m-instruct", train_text=text / "train",
        docs=text / "heldout-docs", prose=text / "heldout-prose",
        far_text=Path(FAR), skills=ROOT / "data/skills/smollm2", native=8192, target=2**20,
        phases=(Phase(2**15, 48, 2e-4), Phase(2**17, 12, 2e-4)), ropes={},
        siblings={"record": 200, "reverse": 400, "dates": 200}, sibling_length=1024,
        sibling_lr=5e-5, needles=(2**15, 2**17), far=(2**17, 2**18, 2**19, 2**20), depths=5,
        trials=2, grid_depths=10, grid_rows=1, position_windows=1, at=2**17,
        ranks=("4", "16", "27", "64", "noise", "whole"), rank_of=GENTLE, merge_rank="27",
        window=2048, window_tokens=65536, limit=200, facts=(1, 8, 32),
        # Of an H200: 120 s for a row of 1M; 65,500 and 23,600 tokens/s of training at 32K and 128K.
        costs=Costs(read=(1e-6, 1.1e-10), train=(6.2e-6, 2.76e-10), step=0.25, load=6, start=25,
                    surgery=4), taught=0.5, short_texts=(text / "train", text / "train/anarchism"))


def _tiny() -> Plan:
    return Plan(
        model=ROOT / "assets/demo/base", train_text=ROOT / "assets/demo/notes.jsonl",
        docs=ROOT / "data/skills/tiny/text.txt", prose=Path(PROSE),
        far_text=ROOT / "data/skills/tiny/text.txt", skills=ROOT / "data/skills/tiny",
        native=256, target=2048,
        phases=(Phase(512, 30, 1e-4), Phase(1024, 5, 5e-5)), ropes={},
        siblings={"record": 60}, sibling_length=256, sibling_lr=1e-3, needles=(512, 1024),
        far=(512, 1024, 2048), depths=3, trials=2, grid_depths=4, grid_rows=1, position_windows=4,
        at=1024, ranks=("4", "16", "noise", "whole"), rank_of="by-parts", merge_rank="16",
        window=256, window_tokens=4096, limit=50, facts=(1,),
        costs=Costs(read=(2e-5, 1e-8), train=(1e-4, 1e-7), step=0.15, load=1, start=3, surgery=1))


LEVELS: Mapping[str, Level] = {
    "tiny": Level(_tiny, (1, 4)),
    "smollm2": Level(_smollm2, (1, 32),
                     {f"yarn-{factor}": {"method": "yarn", "options": {"attention_factor": factor}}
                      for factor in (1.1, 1.2)},
                     ROOT / "docs/results/search/smollm2-135m-64k/rope-merge-safe.json"),
}


def make_plan(name: str, out: Path, *, target: int | None = None,
              search: Path | None = None) -> Plan:
    """A level's plan with its schedules, made for the target."""
    level = LEVELS[name]
    plan = level.make()
    target = target or plan.target
    made = {key: out / path for key in ("prose", "far_text")
            if not (path := getattr(plan, key)).is_absolute()}
    ropes = make_ropes(level.ramp, search or level.search)
    return replace(plan, target=target, ropes={**level.own, **ropes}, **made)


def write_far_text(plan: Plan) -> None:
    """Lay copies of the held-out texts into one folder, if the plan's far text is to be made."""
    if plan.far_text.name != FAR or plan.far_text.exists():
        return
    plan.far_text.mkdir(parents=True)
    for number, source in enumerate((plan.docs, plan.prose)):
        for file in list_files(source):
            shutil.copyfile(file, plan.far_text / f"{number}-{file.name}")

