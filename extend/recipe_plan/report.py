"""The plan of a recipe as JSON, and as text for a terminal."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from extend.capacity import GIB, gpu_rates
from extend.recipe_plan.cost import Phase
from extend.recipe_plan.facts import Facts
from extend.recipe_plan.plan import RecipePlan, StagePlan
from extend.results import format_length

_HEADER = ("stage", "kind", "does", "reads", "writes", "time", "GPUs", "GiB a GPU", "GiB host")
_WIDTH = 100
_LEGEND = """\
All numbers are estimates but sizes of files that are here. Memory of training is counted, its time
modelled from measured steps (docs/planning.md): optimizer steps alone, without loading, tokenising
and checkpoints. Time of evaluations counts reading of prompts; that of extract and merge is
bytes over the speed of one measured host. `-` is not counted."""


def plan_json(plan: RecipePlan) -> dict[str, Any]:
    """The object that `extend plan RECIPE --json` prints; None stands for what is not known."""
    low, high = _range(plan)
    machine = plan.machine
    return {
        "recipe": str(plan.recipe.path), "name": plan.recipe.name,
        "machine": {"gpu": machine.gpu, "gpus": machine.num_gpus, "hosts": machine.hosts,
                    "gpu_memory_bytes": machine.gpu_memory_bytes,
                    "host_memory_bytes": machine.host_memory_bytes or None,
                    "assumed": plan.assumed},
        "inputs": {value: _facts_json(facts) for value, facts in plan.inputs.items()},
        "stages": [_stage_json(stage) for stage in plan.stages],
        "time": {"seconds": plan.seconds, "seconds_range": [low, high],
                 "gpu_hours": plan.gpu_seconds / 3600, "not_counted": plan.untimed},
        "disk": {"directory": str(plan.run_dir), "needed_bytes": plan.disk_bytes,
                 "free_bytes": plan.free_bytes, "not_counted": plan.unsized},
        "downloads": {"directory": str(plan.cache_dir), "needed_bytes": plan.download_bytes,
                      "free_bytes": plan.cache_free_bytes, "files_of": plan.downloads},
        "problems": plan.problems}


def _facts_json(facts: Facts) -> dict[str, Any]:
    return {"where": facts.where, "bytes": facts.num_bytes,
            "download_bytes": facts.download_bytes,
            "parameters": None if facts.shape is None else facts.shape.parameters,
            "shape_from": facts.source or None, "problem": facts.problem or None}


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    cost, decision = stage.cost, stage.decision
    seconds = cost.seconds
    return {
        "name": decision.stage.name, "stage": decision.stage.kind, "action": decision.action,
        "reason": decision.reason or None, "reads_bytes": cost.reads, "writes_bytes": cost.writes,
        "scratch_bytes": cost.scratch, "seconds": seconds,
        "seconds_range": None if seconds is None else [seconds * (1 - cost.spread),
                                                       seconds * (1 + cost.spread)],
        "gpus": cost.gpus,
        "gpu_bytes": None if cost.gpu_bytes is None else round(cost.gpu_bytes),
        "host_bytes": None if cost.host_bytes is None else round(cost.host_bytes),
        "fits": cost.fits, "phases": [_phase_json(phase) for phase in cost.phases],
        "notes": list(cost.notes)}


def _phase_json(phase: Phase) -> dict[str, Any]:
    return {"length": phase.length, "batch_rows": phase.rows, "steps": phase.steps,
            "tokens": phase.length * phase.rows * phase.steps, "seconds": phase.seconds,
            "step_seconds": phase.step_seconds, "gpu_bytes": round(phase.gpu_bytes),
            "recomputed_layers": phase.recomputed, "mfu": phase.mfu}


def plan_text(plan: RecipePlan) -> str:
    """Title, table, totals, what is wrong, notes."""
    parts = [_title(plan), _table(plan),
             "\n".join(_filled(line, indent=11) for line in _totals(plan))]
    for title, told in (("would stop the run", plan.problems), ("notes", _notes(plan))):
        lines = [_filled(f"  {line}", indent=4) for line in told]
        if lines:
            parts.append("\n".join([title, *lines]))
    return "\n\n".join([*parts, _LEGEND])


def _filled(line: str, indent: int) -> str:
    """The line, and where it is too long what is left of it below, further to the right."""
    return textwrap.fill(line, _WIDTH, subsequent_indent=" " * indent, break_long_words=False,
                         break_on_hyphens=False)


def _title(plan: RecipePlan) -> str:
    machine, rates = plan.machine, gpu_rates(plan.machine.gpu)
    where = f"{machine.num_gpus} x {rates.name} of {machine.gpu_memory_bytes / GIB:.0f} GiB"
    if machine.hosts > 1:
        where += f" in {machine.hosts} hosts"
    if plan.assumed:
        where += ", assumed: no GPU is visible here; say which with --gpus and --gpu"
    return f"{plan.recipe.name}: {len(plan.stages)} stages on {where}"


def _table(plan: RecipePlan) -> str:
    rows: list[Sequence[str]] = [_HEADER]
    after: dict[int, list[str]] = {}
    for stage in plan.stages:
        rows.append(_row(stage))
        if stage.runs:
            after[len(rows) - 1] = [_phase_line(phase) for phase in stage.cost.phases]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = []
    for number, row in enumerate(rows):
        cells = (cell.ljust(width) if i < 3 else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
        lines += after.get(number, [])
    return "\n".join(lines)


def _row(stage: StagePlan) -> Sequence[str]:
    cost, decision = stage.cost, stage.decision
    name, kind = decision.stage.name, decision.stage.kind
    if not stage.runs:
        return (name, kind, "skip", *[""] * 6)
    does = decision.action if cost.fits else f"{decision.action}, does not fit"
    return (name, kind, does, _size(cost.reads), _size(cost.writes), _time(cost.seconds),
            str(cost.gpus or "-"), _gib(cost.gpu_bytes), _gib(cost.host_bytes))


def _phase_line(phase: Phase) -> str:
    each = f"{phase.step_seconds:.3g} s" if phase.step_seconds < 100 else \
        _time(phase.step_seconds)
    return (f"    {format_length(phase.length)}: {_counted(phase.steps, 'step')} of "
            f"{_counted(phase.rows, 'row')}, {each} each ({_time(phase.seconds)}), "
            f"{phase.gpu_bytes / GIB:.1f} GiB a GPU, {phase.recomputed} layers recomputed, MFU "
            f"{phase.mfu:.0%}")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _totals(plan: RecipePlan) -> Iterator[str]:
    low, high = _range(plan)
    left_out = f"; not counted: {', '.join(plan.untimed)}" if plan.untimed else ""
    yield (f"time       {_time(plan.seconds)} ({_time(low)[1:]} to {_time(high)[1:]}), "
           f"{plan.gpu_seconds / 3600:.3g} GPU hours{left_out}")
    left_out = f"; not counted: {', '.join(plan.unsized)}" if plan.unsized else ""
    yield (f"disk       {_size(plan.disk_bytes)} at the fullest moment, "
           f"{_size(plan.free_bytes)} free in {plan.run_dir}{left_out}")
    if not plan.downloads:
        yield "downloads  none"
        return
    yield (f"downloads  {_size(plan.download_bytes)} into {plan.cache_dir} "
           f"({_size(plan.cache_free_bytes)} free): "
           + ", ".join(f"{value} ({_size(size)})" for value, size in plan.downloads.items()))


def _notes(plan: RecipePlan) -> Iterator[str]:
    """What is to be said of inputs, and of stages: once what is the same of several."""
    for value, facts in plan.inputs.items():
        if facts.source:
            yield f"{value}: {facts.source}"
        elif facts.problem and value not in plan.missing:
            yield f"{value}: {facts.problem}"
    told: dict[str, list[str]] = {}
    for stage in plan.stages:
        decision, cost = stage.decision, stage.cost
        notes = list(cost.notes[0 if cost.fits else 1:]) if stage.runs else []
        if decision.reason:
            notes.insert(0, f"{decision.action}, {decision.reason}")
        for note in notes:
            told.setdefault(note, []).append(decision.stage.name)
    for note, names in told.items():
        yield f"{', '.join(names)}: {note}"


def _range(plan: RecipePlan) -> tuple[float, float]:
    costs = [stage.cost for stage in plan.stages if stage.runs and stage.cost.seconds is not None]
    return (sum(cost.seconds * (1 - cost.spread) for cost in costs),
            sum(cost.seconds * (1 + cost.spread) for cost in costs))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (float("inf"), 3600, "h")):
        if seconds < limit:
            return f"~{seconds / unit:.3g} {name}" if seconds >= 1 else "~1 s"
    raise AssertionError("no end of time")


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    if size < 0.1 * GIB:
        return f"{max(size, 0) / 2**20:.0f} MiB"
    return f"{size / GIB:.1f} GiB"


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.1f}"
