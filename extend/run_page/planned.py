"""What was planned for each stage beside what it took."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extend.model_config import read_json
from extend.run_page.story import StageStory, Story
from extend.run_page.words import duration, gib
from extend.run_record import PLAN_NAME


@dataclass(frozen=True, slots=True)
class Row:
    """A stage: time, memory of a GPU and of the host, and output, measured and planned."""

    stage: StageStory
    cells: Sequence[str]


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan that the run was started with.

    Attributes:
        machine: what it is for, in words.
        total: the time of all stages whose time is known.
        problems: what would have stopped the run, as far as the plan could tell.
    """

    rows: Sequence[Row]
    machine: str
    total: str
    problems: Sequence[str]


def planned_of(story: Story) -> Planned | None:
    """The plan beside what was measured; None without one."""
    path = story.out / PLAN_NAME
    if path.is_file():
        return story.gaps.attempt("plan", lambda: _read(read_json(path), story))
    story.gaps.add("plan", f"the run's directory holds no {PLAN_NAME}, so there is nothing to set "
                           "against what was measured")
    return None


def _read(plan: Mapping[str, Any], story: Story) -> Planned:
    known = {entry["name"]: entry for entry in plan["stages"]}
    machine = plan.get("machine") or {}
    assumed = bool(machine.get("assumed"))
    rows = [Row(stage, _cells(known[stage.name], stage, compare=not assumed))
            for stage in story.stages if stage.name in known]
    if not rows:
        story.gaps.add("plan", "; ".join(plan.get("problems") or ["it knows no stage of the run"]))
    return Planned(rows, _machine(machine, assumed=assumed), _total(plan.get("time")),
                   plan.get("problems") or [])


def _machine(machine: Mapping[str, Any], *, assumed: bool) -> str:
    if not machine:
        return "a machine that it does not name"
    text = f"{machine['gpus']} x {machine['gpu'].upper()}"
    if (machine.get("hosts") or 1) > 1:
        text += f" in {machine['hosts']} hosts"
    return text + (", which was assumed because no GPU was visible, so what was measured elsewhere "
                   "is not compared with it" if assumed else "")


def _total(time: Mapping[str, Any] | None) -> str:
    if not time or not time.get("seconds"):
        return ""
    low, high = time["seconds_range"]
    return f"{duration(time['seconds'])} ({duration(low)} to {duration(high)})"


def _cells(entry: Mapping[str, Any], stage: StageStory, *, compare: bool) -> list[str]:
    written = sum(file["bytes"] for file in stage.outputs.values()) or None
    known = (_cell(entry.get("seconds"), stage.seconds, duration, compare),
             _cell(entry.get("gpu_bytes"), stage.gpu_bytes, gib, compare),
             _cell(entry.get("host_bytes"), stage.host_bytes, gib, compare))
    return [*known, _cell(entry.get("writes_bytes"), written, gib, True)]  # on any machine


def _cell(planned: float | None, measured: float | None, form: Callable[[float | None], str],
          compare: bool) -> str:
    """`1 min 2 s (planned 2 min 3 s, x 0.5)`."""
    if planned is None:
        return f"{form(measured)} (not planned)"
    ratio = f", x {measured / planned:.2g}" if compare and planned and measured else ""
    return f"{form(measured)} (planned {form(planned)}{ratio})"
