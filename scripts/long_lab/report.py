"""results.json, tables and plots of whatever has been measured."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safety_trials.report import markdown
from transfer_lab.plots import _pyplot, _save

from extend.evaluate.comparison import build_table, grid_tasks, to_markdown
from extend.evaluate.heatmap import build_panels, draw_heatmap
from extend.evaluate.plots import draw_plot, loss_plots, score_plots
from extend.evaluate.report import refresh
from extend.output import write_json
from extend.results import RESULTS_NAME, Results, format_length, format_rate, read_results

from .plan import GROUPS, SHIPPED, Plan, Unit, describe
from .work import UNIT, Workshop

TITLES = {"short": "Short text", "needles": "Single needles", "siblings": "Siblings",
          "ranks": "The adapter by rank", "grid-text": "Streamed grid in held-out text",
          "positions": "Loss by position on held-out text", "grid": "Streamed grid in filler"}
ALONE = "alone"
BARE = "+no-sidecar"
RESULT_KEYS = ("schema", "model", "summary", "rows")
Groups = Mapping[str, Sequence[Results]]


def todo(plan: Plan, shop: Workshop, units: Sequence[Unit]) -> str:
    """What is still to be measured, with expected seconds; models count where first needed."""
    lines, seen, total = [describe(plan)], set(), 0.0
    for unit in units:
        making = 0.0 if unit.model in seen else _new_seconds(shop, unit.model, seen)
        total += making + unit.seconds
        lines.append(f"{unit.name:34s} {unit.seconds:6.0f} s" + (
            f" + {making:.0f} s for its model" if making else ""))
    return "\n".join([*lines, f"{len(units)} measures, {total:.0f} s"])


def _new_seconds(shop: Workshop, key: tuple[str, ...], seen: set[tuple[str, ...]]) -> float:
    """Seconds of a model and of what it lacks, but for models that are made by then."""
    if key in seen or shop.path(key).exists():
        return 0.0
    seen.add(key)
    needs = shop.needs(key)
    own = shop.seconds(key) - sum(shop.seconds(other) for other in needs)
    return own + sum(_new_seconds(shop, other, seen) for other in needs)


# ---- collecting ----------------------------------------------------------------------------------

def collect(out: Path, plan: Plan) -> list[Path]:
    """Write results.json, table.md and the plots of what there is; return their paths.

    Raises:
        SystemExit: nothing has been measured yet.
    """
    groups = read_groups(out)
    if not groups:
        raise SystemExit(f"{out}: holds no results; run the trials first")
    made = [json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((out / "made").glob("*.json"))]
    units = [_unit(group, result) for group, results in groups.items() for result in results]
    write_json(out / RESULTS_NAME, {"schema": 1, "training": describe(plan),
                                    "ropes": dict(plan.ropes), "models": made, "units": units})
    (out / "table.md").write_text(tables(plan, groups, made, units), encoding="utf-8")
    return [out / RESULTS_NAME, out / "table.md", *draw(groups, made, plan, out)]


def read_groups(out: Path) -> dict[str, list[Results]]:
    """Group -> its finished measures, in the order of the groups and of their units' ends."""
    found = {}
    for group in GROUPS:
        ended = sorted((out / "results" / group).glob(f"*/{UNIT}"), key=lambda p: p.stat().st_mtime)
        if ended:
            found[group] = [refresh(result) for result in
                            read_results({path.parent.name: path.parent for path in ended})]
    return found


def _unit(group: str, result: Results) -> dict[str, Any]:
    """A measure as it stands in results.json: without the single trials."""
    record = json.loads((result.path.parent / UNIT).read_text(encoding="utf-8"))
    rows = [{key: value for key, value in row.items() if key != "trials"}
            for row in result.data["rows"]]
    return {**record, **{key: result.data[key] for key in RESULT_KEYS}, "rows": rows}


def restore(out: Path, record: Path) -> None:
    """Lay out the measures of a results.json again, where they are not: to go on elsewhere."""
    found = json.loads(record.read_text(encoding="utf-8"))
    for made in found["models"]:
        _write(out / "made" / f"{'--'.join(made['key'])}.json", made)
    for unit in found["units"]:
        folder = out / "results" / unit["group"] / unit["label"]
        _write(folder / RESULTS_NAME, {key: unit[key] for key in RESULT_KEYS})
        _write(folder / UNIT, {key: value for key, value in unit.items()
                               if key not in RESULT_KEYS})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


# ---- tables --------------------------------------------------------------------------------------

def tables(plan: Plan, groups: Groups, made: Sequence[Mapping[str, Any]],
           units: Sequence[Mapping[str, Any]]) -> str:
    about = sorted({f"{u['device']}, torch {u['torch']}, transformers {u['transformers']}, commit "
                    f"{u['commit']}, seed {u['seed']}" for u in units})
    spent = sum(u["seconds"] for u in units), sum(m["seconds"] for m in made)
    parts = [f"{'/'.join(plan.model.parts[-2:])}, native length {format_length(plan.native)}. "
             f"{describe(plan)}. {'; '.join(about)}. {spent[0]:.0f} s of measuring, {spent[1]:.0f} "
             "s of training, extracting and merging.\n",
             "Shares stand with right answers of prompts and 95 % Wilson intervals.\n",
             "## All schedules\n", overview(plan, groups, made)]
    for group, results in groups.items():
        parts += [f"## {TITLES[group]}\n", GROUP_TABLES.get(group, _plain)(plan, results, made)]
    return "\n".join(parts)


def overview(plan: Plan, groups: Groups, made: Sequence[Mapping[str, Any]]) -> str:
    """A line a schedule, of the longest length that each group asked."""
    labels = [SHIPPED, *plan.ropes]
    by = {group: {r.label: r for r in results} for group, results in groups.items()}
    course = {m["key"][1]: m for m in made if m["key"][0] == "long"}
    columns = {
        "training loss": lambda name: _course(course.get(name)),
        "loss, kind trained on": lambda name: _change(by, name, "docs"),
        "loss, other prose": lambda name: _change(by, name, "prose"),
        "KL, other prose": lambda name: _divergence(by, name, "prose", "kl"),
        "passkey": lambda name: _longest(by, "needles", name, "passkey"),
        "passkey in text": lambda name: _longest(by, "needles", name, "passkey-text"),
        "stream in text": lambda name: _longest(by, "grid-text", name, "passkey-stream-text"),
        "loss by position": lambda name: _slope(by, name)}
    return markdown(["schedule", *columns],
                    [[name, *(cell(name) for cell in columns.values())] for name in labels])


def _course(record: Mapping[str, Any] | None) -> str:
    if not record or record.get("last_loss") is None:
        return ""
    return f"{record['first_loss']:.3f} to {record['last_loss']:.3f}"


def _entry(by: Mapping[str, Mapping[str, Results]], group: str, name: str, kind: str,
           task: str) -> Mapping[str, Any] | None:
    result = by.get(group, {}).get(name)
    return result and result.data["summary"][kind].get(task)


def _change(by: Mapping[str, Mapping[str, Results]], name: str, text: str) -> str:
    entry = _entry(by, "short", name, "divergences", text)
    if not entry:
        return ""
    share = 100 * (entry["loss"] / entry["reference_loss"] - 1)
    return f"{entry['loss']:.3f} ({share:+.2f} %)"


def _divergence(by: Mapping[str, Mapping[str, Results]], name: str, text: str, key: str) -> str:
    entry = _entry(by, "short", name, "divergences", text)
    return "" if not entry else f"{entry[key]:.4f}"


def _longest(by: Mapping[str, Mapping[str, Results]], group: str, name: str, task: str) -> str:
    entry = _entry(by, group, name, "tasks", task)
    if not entry or not entry["lengths"]:
        return ""
    length = max(map(int, entry["lengths"]))
    return f"{format_length(length)}: {format_rate(entry['lengths'][str(length)])}"


def _slope(by: Mapping[str, Mapping[str, Results]], name: str) -> str:
    entry = _entry(by, "positions", name, "curves", "loss-by-position")
    return entry["verdict"] if entry else ""


def _plain(plan: Plan, results: Sequence[Results], made: Any) -> str:
    return to_markdown([r.label for r in results], build_table(list(results)))


def short_table(plan: Plan, results: Sequence[Results], made: Any) -> str:
    """Loss beside the shipped model's on the same windows, and KL from it."""
    lines = []
    for result in results:
        for text, e in result.data["summary"]["divergences"].items():
            error = e.get("difference_stderr")
            gap = f"{e['difference']:+.4f}" + ("" if error is None else f" +/- {error:.4f}")
            lines.append([result.label, text, f"{e['loss']:.4f}", f"{e['reference_loss']:.4f}",
                          f"{100 * (e['loss'] / e['reference_loss'] - 1):+.2f} %",
                          gap, f"{e['kl']:.4f}", f"{100 * e['agreement']:.2f} %",
                          f"{e['tokens']:,}"])
    return markdown(["schedule", "text", "loss", "shipped", "change", "difference", "KL",
                     "same first choice", "tokens"], lines)


def sibling_table(plan: Plan, results: Sequence[Results], made: Any) -> str:
    """Skill, passkeys in text and prose, before (alone) and after each merge."""
    lines = []
    for skill, label, result in _siblings(results):
        summary = result.data["summary"]
        loss = summary["losses"].get("prose", {}).get("loss")
        lines.append([skill, label, format_rate(summary["skills"].get("skill")) or "",
                      _passkeys(result), "" if loss is None else f"{loss:.3f}"])
    return markdown(["sibling", "merged with", "skill", "passkey in text", "loss, other prose"],
                    lines)


def _siblings(results: Sequence[Results]) -> Iterator[tuple[str, str, Results]]:
    """(skill, schedule or `alone`, its results), siblings together and each alone first."""
    parts = [(*r.label.split("+", 1), r) for r in results]
    return iter(sorted(parts, key=lambda part: (part[0], part[1] != ALONE)))


def _passkeys(result: Results) -> str:
    lengths = result.data["summary"]["tasks"].get("passkey-text", {}).get("lengths", {})
    return ", ".join(f"{format_length(int(n))}: {format_rate(e)}" for n, e in lengths.items())


def rank_table(plan: Plan, results: Sequence[Results], made: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for result in sorted(results, key=_rank_order):
        size = adapter_size(result.label, plan, made)
        lines.append([result.label.removesuffix(BARE), "out" if BARE in result.label else "in",
                      "" if size is None else f"{size / 2**20:.2f} MiB", _passkeys(result)])
    return markdown(["rank", "sidecar", "adapter file", "passkey in text"], lines)


def _rank_order(result: Results) -> tuple[int, str]:
    rank = result.label.removesuffix(BARE)
    return (int(rank) if rank.isdigit() else 10**6), result.label


def adapter_size(label: str, plan: Plan, made: Sequence[Mapping[str, Any]]) -> int | None:
    """Bytes of the adapter's file; None for the whole delta, which has none."""
    key = ["adapter", plan.rank_of, label.removesuffix(BARE)]
    return next((m["adapter_bytes"] for m in made if m["key"] == key), None)


GROUP_TABLES = {"short": short_table, "siblings": sibling_table, "ranks": rank_table}


# ---- plots ---------------------------------------------------------------------------------------

def draw(groups: Groups, made: Sequence[Mapping[str, Any]], plan: Plan, out: Path) -> list[Path]:
    """Scores and losses by length, heat maps of the streamed grids, ranks."""
    drawn = []
    for group in ("needles", "grid-text", "grid", "positions"):
        results = list(groups.get(group, ()))
        for plot in [*score_plots(results, grid_tasks(results)), *loss_plots(results)]:
            drawn.append(out / f"{group}-{plot.title}.png")
            draw_plot(plot, drawn[-1])
        for name in grid_tasks(results) if group.startswith("grid") else ():
            drawn.append(out / f"heatmap-{name}.png")
            draw_heatmap(build_panels(results, name), drawn[-1], name)
    ranked = plot_ranks(groups.get("ranks", ()), made, plan, out / "ranks.png")
    return [*drawn, *([ranked] if ranked else [])]


def plot_ranks(results: Sequence[Results], made: Sequence[Mapping[str, Any]], plan: Plan,
               path: Path) -> Path | None:
    """Passkeys in text against the size of the adapter's file, with intervals."""
    points = {BARE: [], "": []}
    for result in results:
        size = adapter_size(result.label, plan, made)
        entry = result.data["summary"]["tasks"]["passkey-text"]["lengths"][str(plan.at)]
        if size is not None:
            points[BARE if BARE in result.label else ""].append(
                (size / 2**20, entry, result.label.removesuffix(BARE)))
    whole = next((r.data["summary"]["tasks"]["passkey-text"]["lengths"][str(plan.at)]["score"]
                  for r in results if r.label == "whole"), None)
    if not points[""]:
        return None
    figure, axis = _pyplot().subplots(figsize=(6.4, 4.2))
    for (kind, found), marker in zip(points.items(), "os", strict=True):
        found.sort(key=lambda point: point[0])
        sizes, scores = [p[0] for p in found], [p[1]["score"] for p in found]
        spread = [[max(0.0, e["score"] - e["wilson_low"]) for _, e, _ in found],
                  [max(0.0, e["wilson_high"] - e["score"]) for _, e, _ in found]]
        axis.errorbar(sizes, scores, yerr=spread, marker=marker, capsize=3, linewidth=1.2,
                      label="without sidecar" if kind else "with sidecar")
        for size, entry, rank in found if not kind else ():
            axis.annotate(rank, (size, entry["score"]), xytext=(4, 5), textcoords="offset points",
                          fontsize=8)
    if whole is not None:
        axis.axhline(whole, color="black", linestyle="--", linewidth=1, label="whole delta")
    axis.set(xscale="log", ylim=(-0.03, 1.05), xlabel="adapter file, MiB (rank beside the point)",
             ylabel=f"passkeys in held-out text at {format_length(plan.at)}")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _save(figure, path)
