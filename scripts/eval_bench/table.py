"""The figures of bench_eval.py as Markdown."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Figures = Mapping[str, Any]


def table(result: Figures) -> str:
    """One table of all sections that have run."""
    lines = [f"{result['device']}, {result['architecture']} of {result['layers']} layers in "
             f"{result['dtype']}, weights {result['weights']}, chunk {result['chunk']}, torch "
             f"{result['torch']}, transformers {result['transformers']}, commit "
             f"{result['commit']}", "", "| what | result | goal |", "|---|---|---|"]
    for section, rows in _ROWS.items():
        if section in result:
            lines += [f"| {what} | {found} | {goal} |" for what, found, goal in
                      rows(result[section])]
    return "\n".join(lines) + "\n"


def _grid(found: Figures) -> Iterator[tuple[str, str, str]]:
    peak, parts = found["stream_peak_gib"], found["stream_parts"]
    scaled = f", scaled from {found['cells_timed']} cells" if found["cells_scaled"] else ""
    compared = found["against_one_forward"]
    yield (f"{found['cells']} cells to {found['lengths'][-1]} tokens, streamed",
           f"{found['stream_seconds']} s (again {found['stream_again_seconds']} s)", "")
    yield "of which reading / asking / all else, timed apart", " / ".join(
        f"{parts[name]} s" for name in ("read", "ask", "else")), ""
    yield "the same cell by cell", f"{found['cells_seconds']} s{scaled}", ""
    yield "cell by cell / streamed", f"{found['ratio']} (again {found['ratio_again']})", ">= 20"
    yield ("stream against one forward of the prompt",
           f"{compared['same_answers']} of {compared['cells']} answers the same, losses within "
           f"{compared['largest_loss_difference']}", "")
    yield ("score streamed / cell by cell",
           f"{found['stream_score']:.2f} with up to {found['facts_in_view']} facts in view / "
           f"{found['cells_score']:.2f} with one", "")
    yield "peak memory, streamed", _gib(peak), ""


def _prefill(found: Figures) -> Iterator[tuple[str, str, str]]:
    yield (f"prefill of {found['tokens']} tokens in {found['parts']} parts",
           f"{found['seconds']} s ({found['tokens_per_second']} tokens/s)", "")
    yield "its attention kernels alone", f"{found['attention_floor_seconds']} s", ""
    yield "prefill / attention", f"{found['ratio']}", "<= 1.3"
    yield "peak memory, prefill", _gib(found["peak_gib"]), ""


def _prompts(found: Figures) -> Iterator[tuple[str, str, str]]:
    for name, entry in found["tasks"].items():
        result = (f"{entry['seconds']} s ({entry['cpu_seconds']} s of a core)"
                  if "seconds" in entry else entry["left_out"])
        yield f"prompt of {found['tokens']} tokens, {name}", result, "<= 10 s"


def _generate(found: Figures) -> Iterator[tuple[str, str, str]]:
    for length, entry in found["lengths"].items():
        yield (f"{found['rows']} rows of {length} tokens, generated",
               f"{entry['seconds']} s for {entry['new_tokens']} new tokens", "")
    yield "peak memory, generation", _gib(found["peak_gib"]), ""


def _gib(peak: Figures) -> str:
    return ", ".join(f"{value} GiB {name}" for name, value in peak.items())


_ROWS: dict[str, Callable[[Figures], Iterator[tuple[str, str, str]]]] = {
    "grid": _grid, "prefill": _prefill, "prompts": _prompts, "generate": _generate}
