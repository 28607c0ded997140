"""What was planned for each stage beside what it took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extend.model_config import read_json
from extend.run_page.story import StageStory, Story
from extend.run_page.words import duration, gib

PLAN_NAME = "plan.json"


@dataclass(frozen=True, slots=True)
class Planned:
    """A stage's row: planned and measured of each quantity, and their ratio where both are known.
    """

    stage: StageStory
    cells: Sequence[str]


def planned_of(story: Story) -> list[Planned]:
    """A row for every stage that the plan in the run's directory knows; none without a plan."""
    path = story.out / PLAN_NAME
    if not path.is_file():
        story.gaps.add("plan", f"the run's directory holds no {PLAN_NAME}, so there is nothing to "
                               "set against what was measured")
        return []
    plan = story.gaps.attempt("plan", read_json, path)
    return [] if plan is None else story.gaps.attempt("plan", _rows, plan, story) or []


def _rows(plan: Mapping[str, Any], story: Story) -> list[Planned]:
    known = {entry["name"]: entry for entry in plan["stages"]}
    return [Planned(stage, _cells(known[stage.name], stage)) for stage in story.stages
            if stage.name in known]


def _cells(entry: Mapping[str, Any], stage: StageStory) -> list[str]:
    written = sum(file["bytes"] for file in stage.outputs.values()) or None
    pairs = ((entry.get("seconds"), stage.seconds, duration),
             (entry.get("gpu_bytes"), stage.gpu_bytes, gib),
             (entry.get("host_bytes"), stage.host_bytes, gib),
             (entry.get("disk_bytes"), written, gib))
    return [text for planned, measured, form in pairs
            for text in (form(planned), form(measured) + _ratio(planned, measured))]


def _ratio(planned: float | None, measured: float | None) -> str:
    return f" (x {measured / planned:.2g})" if planned and measured else ""
