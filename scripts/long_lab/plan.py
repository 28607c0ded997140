"""What is trained and what is asked at each level, in order of what it tells. Imports no torch.

Seconds are what one H200 (level tiny: one CPU core) was seen or is computed to take; they decide
what is begun before a budget ends, and are corrected by what the machine at hand takes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.option_types import parse_length
from extend.results import format_length

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = "shipped"
MERGE_SAFE = "merge-safe"
NOISE, WHOLE = "noise", "whole"
GROUPS = ("short", "needles", "siblings", "ranks", "grid-text", "positions", "grid")
Rope = Mapping[str, Any]


@dataclass(frozen=True)
class Phase:
    """A stretch of training; rows of the first reach the target's positions by skipping."""

    length: int
    steps: int
    lr: float
    rows: int = 1

    @property
    def tokens(self) -> int:
        return self.length * self.steps * self.rows


@dataclass(frozen=True)
class Costs:
    """Seconds: `read` and `train` are of a row, linear and square coefficients of its tokens."""

    read: tuple[float, float]
    train: tuple[float, float]
    step: float  # of a fine-tune on a skill
    load: float  # of a model, and all else of a measure that no prompt accounts for
    start: float  # of a training, beside its rows
    surgery: float  # of one extract or merge


@dataclass(frozen=True)
class Plan:
    """The whole experiment.

    Attributes:
        model: the shipped base. train_text, docs, prose: text trained on; held out, of that kind;
            held out, of another kind. far_text: held out, longer than the target. skills: folder
            of SKILL/{train,test}.jsonl.
        native, target: tokens.
        phases: of every schedule alike. taught: the share of long text rows that are distilled from
            the shipped model, which reads them in windows. short_texts: what short rows are of.
        ropes: schedule -> RoPE.
        siblings: skill -> steps of its fine-tune.
        needles, far: lengths of single prompts, and of the streamed grid.
        depths, trials: of single prompts; grid_depths, grid_rows: of the streamed grid.
        at: the length at which merged siblings and ranks are asked.
        ranks: ranks, `noise` or `whole`. rank_of: the schedule they belong to. merge_rank: of the
            adapter that siblings are given; `whole` is the delta itself.
        window, window_tokens: of short text. limit: examples of a skill.
    """

    model: Path
    train_text: Path
    docs: Path
    prose: Path
    far_text: Path
    skills: Path
    native: int
    target: int
    phases: tuple[Phase, ...]
    ropes: Mapping[str, Rope]
    siblings: Mapping[str, int]
    sibling_length: int
    sibling_lr: float
    needles: tuple[int, ...]
    far: tuple[int, ...]
    depths: int
    trials: int
    grid_depths: int
    grid_rows: int
    position_windows: int
    at: int
    ranks: tuple[str, ...]
    rank_of: str
    merge_rank: str
    window: int
    window_tokens: int
    limit: int
    facts: tuple[int, ...]
    costs: Costs
    taught: float = 0.0
    short_texts: tuple[Path, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)


@dataclass(frozen=True)
class Unit:
    """One evaluation: `model` is a key of `Workshop.make`, `tasks` go to `extend.evaluate`."""

    group: str
    label: str
    model: tuple[str, ...]
    tasks: tuple[Mapping[str, Any], ...]
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.group}/{self.label}"


# ---- schedules -----------------------------------------------------------------------------------

def make_ropes(ramp: tuple[float, float], search: Path | None) -> dict[str, Rope]:
    """The schedules under trial."""
    low, high = ramp
    found = {"by-parts": {"method": "ntk-by-parts", "options": {"low_freq_factor": low,
                                                               "high_freq_factor": high}}}
    if search is not None:
        record = json.loads(search.read_text(encoding="utf-8"))
        found[MERGE_SAFE] = {"method": record["method"], "options": {
            **record["options"], "found_for": record["to"]}}  # carried on to the target
    return found | {name: {"method": name} for name in ("critical", "ntk", "gradient-v1", "yarn")}


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Read `32k:64,128k:2:5e-5:4`: length, steps, and unless given rate 1e-4 and 1 row a step."""
    phases = []
    for part in text.split(","):
        length, steps, *rest = part.split(":")
        lr, rows = (*rest, *("1e-4", "1")[len(rest):])
        phases.append(Phase(parse_length(length), int(steps), float(lr), int(rows)))
    return tuple(phases)


# ---- units ---------------------------------------------------------------------------------------

def list_units(plan: Plan) -> Iterator[Unit]:
    """All units, the most telling first; those of a group stand together."""
    longs = {name: ("long", name) for name in plan.ropes}
    for label, model in {SHIPPED: (SHIPPED,), **longs}.items():
        yield _unit(plan, "short", label, model, short_tasks(plan))
        lengths = (plan.native,) if label == SHIPPED else plan.needles
        yield _unit(plan, "needles", label, model, needle_tasks(plan, lengths))
    for skill in plan.siblings:
        yield _unit(plan, "siblings", f"{skill}+alone", ("sibling", skill),
                    skill_tasks(plan, skill, plan.native))
    for skill in plan.siblings:
        for name in plan.ropes:
            yield _unit(plan, "siblings", f"{skill}+{name}",
                        ("merged", name, plan.merge_rank, skill),
                        skill_tasks(plan, skill, plan.at))
    for rank in plan.ranks:
        for sidecar in ((True,) if rank == WHOLE else (True, False)):
            label = f"{rank}{'' if sidecar else '+no-sidecar'}"
            model = ("merged", plan.rank_of, rank, SHIPPED, *(() if sidecar else ("bare",)))
            yield _unit(plan, "ranks", label, model, rank_tasks(plan))
    for group, tasks in (("grid-text", grid_tasks(plan, text=True)),
                         ("positions", position_tasks(plan)),
                         ("grid", grid_tasks(plan, text=False))):
        for name, model in longs.items():
            yield _unit(plan, group, name, model, tasks)


def short_tasks(plan: Plan) -> list[dict[str, Any]]:
    return [{"task": "divergence", "name": name, "text": str(text), "window": plan.window,
             "max_tokens": plan.window_tokens, "reference": str(plan.model)}
            for name, text in (("docs", plan.docs), ("prose", plan.prose))]


def needle_tasks(plan: Plan, lengths: Sequence[int]) -> list[dict[str, Any]]:
    grid = {"lengths": list(lengths), "depths": plan.depths}
    many, single = {**grid, "trials": plan.trials}, {**grid, "trials": 1}
    return [{"task": "passkey", **many}, {"task": "passkey-text", **_in_text(plan), **many},
            {"task": "number-needle", **_in_text(plan), **single},
            {"task": "multi-key", **_in_text(plan), **single}]


def skill_tasks(plan: Plan, skill: str, length: int) -> list[dict[str, Any]]:
    return [{"task": "exact-match", "name": "skill", "limit": plan.limit,
             "file": str(plan.skills / skill / "test.jsonl")}, *text_passkeys(plan, length),
            {"task": "loss", "name": "prose", "text": str(plan.prose), "window": plan.window,
             "max_tokens": plan.window_tokens}]


def rank_tasks(plan: Plan) -> list[dict[str, Any]]:
    return text_passkeys(plan, plan.at)


def text_passkeys(plan: Plan, length: int) -> list[dict[str, Any]]:
    return [{"task": "passkey-text", **_in_text(plan), "lengths": [length],
             "depths": plan.depths, "trials": plan.trials, "controls": False}]


def grid_tasks(plan: Plan, *, text: bool) -> list[dict[str, Any]]:
    """A whole grid for about one prefill a row."""
    where = {"haystack": str(plan.far_text)} if text else {}
    return [{"task": "passkey-stream", "name": f"passkey-stream{'-text' if text else ''}", **where,
             "lengths": list(plan.far), "depths": plan.grid_depths, "trials": plan.grid_rows,
             "spot_checks": None}]


def position_tasks(plan: Plan) -> list[dict[str, Any]]:
    return [{"task": "loss-by-position", "text": str(plan.far_text), "lengths": [max(plan.far)],
             "trials": plan.position_windows, "native": plan.native, "short": plan.native}]


def _in_text(plan: Plan) -> dict[str, str]:
    return {"haystack": str(plan.docs)}


# ---- seconds -------------------------------------------------------------------------------------

def row_seconds(coefficients: tuple[float, float], tokens: int) -> float:
    return coefficients[0] * tokens + coefficients[1] * tokens ** 2


def _unit(plan: Plan, group: str, label: str, model: tuple[str, ...],
          tasks: Sequence[Mapping[str, Any]]) -> Unit:
    reading = sum(prompts * row_seconds(plan.costs.read, length)
                  for task in tasks for length, prompts in _rows(task))
    return Unit(group, label, model, tuple(tasks), plan.costs.load + reading)


def _rows(task: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(tokens, rows) that a task reads."""
    if task["task"] == "passkey-stream":
        yield max(task["lengths"]), task["trials"]
    elif "lengths" in task:
        for length in task["lengths"]:
            yield length, task["trials"] * task.get("depths", 1)


def train_seconds(plan: Plan) -> float:
    rows = sum(phase.steps * phase.rows * row_seconds(plan.costs.train, phase.length)
               for phase in plan.phases)
    return plan.costs.start + rows


def describe(plan: Plan) -> str:
    """One line on what every schedule is trained on."""
    rows = ", ".join(f"{p.steps} steps of {p.rows} x {format_length(p.length)} at {p.lr:g}"
                     for p in plan.phases)
    return (f"{rows}: {plan.tokens:,} tokens a schedule, positions and RoPE to "
            f"{format_length(plan.target)}")
