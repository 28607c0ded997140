"""The course of every training, also of one that has not ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extend.curves import METRICS_NAME, read_courses
from extend.page.chart import Chart
from extend.results import format_length
from extend.run_page.story import StageStory, Story
from extend.run_page.words import duration

MOST_POINTS = 400  # of a curve: more than a phone has pixels across, two for each pixel of a chart


@dataclass(frozen=True, slots=True)
class Training:
    """What a train stage did.

    Attributes:
        facts: (name, value).
        phases: length, steps, rows, learning rate and RoPE of each, in words.
        note: what the charts leave out, or why they end early.
    """

    stage: StageStory
    facts: Sequence[tuple[str, str]]
    phases: Sequence[Sequence[str]]
    charts: Sequence[Chart]
    note: str


def trainings_of(story: Story) -> list[Training]:
    """Every training that has taken a step; what of the others is missing is told."""
    found = []
    for stage in story.stages:
        if stage.kind == "train":
            training = story.gaps.attempt(f"{stage.name}, its curves", _read, stage, story)
            found += [training] if training else []
    return found


def _read(stage: StageStory, story: Story) -> Training | None:
    done = stage.manifest is not None
    path = stage.directory if done else stage.directory.with_name(
        f"{stage.directory.name}.state") / METRICS_NAME
    if not done and not path.is_file():
        return None  # the stage's own line says why
    courses = read_courses(path, MOST_POINTS)
    steps = int(courses[0].x_range[1])
    options = (stage.manifest or {}).get("options", stage.options)
    phases = [_phase(phase, options.get("rope")) for phase in options.get("schedule") or []]
    every = courses[0].stretch
    notes = [] if every == 1 else [
        f"Of every {every} steps the lowest and the highest are drawn, so no spike is left out."]
    if not done:
        story.gaps.add(f"{stage.name}, the rest of its training",
                       f"it had reached step {steps} when this page was written")
        notes.append(f"The training is not finished: this is its course up to step {steps}.")
    return Training(stage, _facts(stage, courses), phases,
                    [course.chart() for course in courses], " ".join(notes))


def _facts(stage: StageStory, courses: Sequence[Any]) -> list[tuple[str, str]]:
    metrics = stage.results.get("metrics") or {}
    loss = courses[0].curves[0].points
    facts = [("loss", f"{loss[0][1]:.4g} to {loss[-1][1]:.4g} nats a token")]
    if metrics.get("tokens"):
        facts.append(("tokens", f"{metrics['tokens']:,} in {metrics['step']:,} steps"))
        seconds = stage.seconds
        if seconds:
            facts.append(("throughput", f"{metrics['tokens'] / seconds:,.0f} tokens/s over all of "
                                        f"its {duration(seconds)}, start and export included"))
    if stage.results.get("processes"):
        facts.append(("processes", str(stage.results["processes"])))
    options = (stage.manifest or {}).get("options", stage.options)
    return [*facts, ("trained", _trained(options))]


def _trained(options: Mapping[str, Any]) -> str:
    """Which weights."""
    names = ", ".join(options.get("trainable") or [])
    if options.get("mode") == "lora":
        text = f"adapters of rank {options.get('lora_rank', 32)}"
        beside = ", ".join(options.get("trained_beside") or [])
        return text + (f" on {names}" if names else "") + (f", and {beside}" if beside else "")
    return f"weights that match {names}" if names else "all weights"


def _phase(phase: Mapping[str, Any], rope_of_all: Any) -> list[str]:
    length, rope = phase.get("length"), phase.get("rope")
    rope = rope_of_all if rope is None else rope
    told = "the model's" if rope is None else rope.get("method", "auto")
    return [format_length(length) if length else "-",
            str(phase.get("steps") or f"{phase.get('tokens') or 0:,} tokens"),
            str(phase.get("batch_rows", 1)), str(phase.get("lr", "-")), told]
