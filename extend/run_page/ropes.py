"""RoPE before and after: numbers, and a drawing of the frequencies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from extend.model_config import RopeSpec
from extend.page.chart import PALETTE, Chart
from extend.results import format_length
from extend.run_page.story import Story
from extend.run_page.words import flat

_MOST_LINES = len(PALETTE)


@dataclass(slots=True)
class Rope:
    """A RoPE that stages read or wrote.

    Attributes:
        where: the stages, in words.
        made_for: tokens, as config.json says; None for a model that no stage wrote.
    """

    spec: RopeSpec
    where: list[str] = field(default_factory=list)
    made_for: int | None = None

    @property
    def label(self) -> str:
        first, *rest = self.where
        return ", ".join([first, *(text.removeprefix("written by ") for text in rest)])

    @property
    def theta(self) -> str:
        return f"{self.spec.rope_theta:,.10g}"

    @property
    def kind(self) -> str:
        factor = self.spec.scaling.get("factor")
        kind = "plain" if self.spec.rope_type == "default" else self.spec.rope_type
        return kind + (f", factor {factor:g}" if isinstance(factor, int | float) else "")

    @property
    def parameters(self) -> str:
        """The rest of what decides the frequencies."""
        rest = {key: value for key, value in self.spec.scaling.items()
                if key not in ("rope_type", "factor", "original_max_position_embeddings")}
        return "; ".join(f"{key} {_short(value)}" for key, value in flat(rest))

    @property
    def trained_on(self) -> str:
        return format_length(self.spec.original_len)

    @property
    def reaches(self) -> str:
        return format_length(self.made_for or 0) or "-"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def ropes_of(story: Story) -> list[Rope]:
    """Every RoPE that the run knows of, in the order in which stages met it."""
    found: list[Rope] = []

    def meet(data: Mapping[str, Any] | None, where: str, made_for: int | None) -> None:
        if not data:
            return
        spec = RopeSpec.from_json(data)
        rope = next((r for r in found if r.spec == spec), None)
        if rope is None:
            rope = Rope(spec)
            found.append(rope)
        if made_for or not rope.where:
            rope.where.append(where)
        rope.made_for = made_for or rope.made_for

    for stage in story.stages:
        meet(stage.results.get("rope_before"), f"read by {stage.name}", None)
        meet(stage.results.get("rope_after"), f"written by {stage.name}",
             stage.results.get("max_position_embeddings"))
    return found


def rope_charts(ropes: Sequence[Rope]) -> list[Chart]:
    """Wavelength of each pair, and how much slower than under the first RoPE each pair turns."""
    from extend.rope.frequencies import wavelengths

    alike = [r for r in ropes if r.spec.rotary_dim == ropes[0].spec.rotary_dim][:_MOST_LINES]
    waves = [wavelengths(rope.spec).tolist() for rope in alike]
    return [_wave_chart(alike, waves), *([_slow_chart(alike, waves)] if len(alike) > 1 else [])]


def _wave_chart(ropes: Sequence[Rope], waves: Sequence[Sequence[float]]) -> Chart:
    native, target = ropes[0].spec.original_len, max((r.made_for or 0) for r in ropes)
    known = [w for line in waves for w in line if w != float("inf")]
    limits = (min(known) / 1.2, max(*known, native, target) * 1.3)
    chart = Chart("Wavelength of each pair, tokens", "pair, fastest first",
                  (0, len(waves[0]) - 1), limits, log_y=True)
    chart.mark_y(native, f"trained on {format_length(native)}", "var(--soft)")
    if target > native:
        chart.mark_y(target, f"made for {format_length(target)}")
    _add(chart, ropes, waves)
    return chart


def _slow_chart(ropes: Sequence[Rope], waves: Sequence[Sequence[float]]) -> Chart:
    slower = [[new / old if old != new else 1.0 for new, old in zip(line, waves[0])]
              for line in waves]
    known = [s for line in slower for s in line if 0 < s < float("inf")]
    chart = Chart("How many times slower each pair turns", "pair, fastest first",
                  (0, len(waves[0]) - 1), (min(known) / 1.15, max(*known, 1.5) * 1.15), log_y=True)
    _add(chart, ropes, slower)
    return chart


def _add(chart: Chart, ropes: Sequence[Rope], lines: Sequence[Sequence[float]]) -> None:
    for number, (rope, line) in enumerate(zip(ropes, lines)):
        chart.add(rope.label, PALETTE[number],
                  [(i, value) for i, value in enumerate(line) if 0 < value < float("inf")],
                  dashed=number == 0)
