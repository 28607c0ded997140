"""Plots: rank, drift of the target, and what each merger keeps of skill and context."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
TRADED = ("main", "mergers", "learned", "learned-other")
FLOOR = 1e-3  # nats; what lies below is drawn there
MARKERS = "osD^vPX*<>hp"


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """The plots that the rows suffice for."""
    made = [plot(rows, out / f"{name}.png") for name, plot in PLOTS.items()]
    return [path for path in made if path is not None]


def plot_rank(rows: Sequence[Row], path: Path) -> Path | None:
    """Context and KL against rank; the whole delta on the right."""
    own = [row for row in rows if row["group"] == "rank" and row["merge"].startswith("rank ")]
    cases = list(dict.fromkeys((row["target"], row["long"]) for row in own))
    if not cases:
        return None
    figure, (keys, cost) = _pyplot().subplots(1, 2, figsize=(10.5, 3.6))
    for k, case in enumerate(cases):
        points = [(int(row["merge"].split()[1]), row) for row in own
                  if (row["target"], row["long"]) == case]
        whole = next((row for row in rows if row["group"] == "main" and row["merge"] == "whole"
                      and (row["target"], row["long"]) == case), None)
        points += [(2 * max(rank for rank, _ in points), whole)] if whole else []
        ranks, found = zip(*sorted(points, key=lambda p: p[0]), strict=True)
        style = {"marker": MARKERS[k], "markersize": 4, "linewidth": 1.2,
                 "label": f"{case[0]} + {case[1]}"}
        keys.plot(ranks, [key_loss(row) for row in found], **style)
        cost.plot(ranks, [(row["skill"] or row["text"])["kl"] for row in found], **style)
    ticks = sorted({int(row["merge"].split()[1]) for row in own})
    for axis, title in ((keys, "loss on passkeys in held-out text"),
                        (cost, "KL of answers (base: of short text)")):
        axis.set_xscale("log", base=2)
        axis.set_xticks([*ticks, 2 * ticks[-1]], [*map(str, ticks), "whole"])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("rank")
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
    keys.legend(fontsize=7)
    return _save(figure, path)


def key_loss(row: Row) -> float:
    return next(iter(row["passkey"].values()))["text"]["loss"]


def plot_drift(rows: Sequence[Row], path: Path) -> Path | None:
    """KL of answers and skill after merging the whole delta, against steps of the fine-tune."""
    own = [row for row in rows if row["group"] == "main" and row["skill"]]
    skills = list(dict.fromkeys(row["skill_name"] for row in own))
    if not skills:
        return None
    longs = list(dict.fromkeys(row["long"] for row in own))
    figure, axes = _pyplot().subplots(2, len(skills), sharex=True, sharey="row", squeeze=False,
                                      figsize=(3.4 * len(skills) + 2, 5.6))
    for column, skill in enumerate(skills):
        for k, long in enumerate(longs):
            for merge, line in (("RoPE alone", ":"), ("whole", "-")):
                points = sorted(((row["steps"], row) for row in own if (
                    row["skill_name"], row["long"], row["merge"]) == (skill, long, merge)),
                    key=lambda p: p[0])
                for axis, value in ((axes[0][column], lambda row: row["skill"]["score"]),
                                    (axes[1][column], lambda row: row["skill"]["kl"])):
                    axis.plot([steps for steps, _ in points], [value(row) for _, row in points],
                              line, marker=MARKERS[k], color=f"C{k}", markersize=4, linewidth=1.2,
                              label=long + (", RoPE alone" if line == ":" else ", delta"))
        points = sorted((row["steps"], row["skill"]["score"]) for row in rows
                        if row["group"] == "alone" and row["skill_name"] == skill)
        axes[0][column].plot(*zip(*points, strict=True), "k--", linewidth=1, label="target alone")
        axes[0][column].set_title(skill, fontsize=9)
        axes[1][column].set_xlabel("steps of the fine-tune")
        axes[1][column].set_xscale("log")
    axes[0][0].set_ylabel("skill (exact match)")
    axes[1][0].set_ylabel("KL of answers")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=7)
    return _save(figure, path, right=1 - 1.9 / figure.get_figwidth())


def plot_mergers(rows: Sequence[Row], path: Path) -> Path | None:
    """KL of answers against the loss on passkeys in text; best is the lower left corner."""
    own = [row for row in rows if row["group"] in TRADED and row["skill"]]
    tried = {(row["target"], row["long"]) for row in own if row["group"] != "main"}
    cases = [case for case in dict.fromkeys((row["target"], row["long"]) for row in own)
             if case in tried]
    if not cases:
        return None
    merges = list(dict.fromkeys(row["merge"] for row in own))
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = _pyplot().subplots(lines, columns, squeeze=False, sharex=True, sharey=True,
                                      figsize=(3.6 * columns + 2.6, 3.3 * lines))
    for axis, case in zip(axes.flat, cases, strict=False):
        for row in own:
            if (row["target"], row["long"]) == case:
                k = merges.index(row["merge"])
                axis.plot(max(row["skill"]["kl"], FLOOR), max(key_loss(row), FLOOR),
                          MARKERS[k % len(MARKERS)], color=f"C{k % 10}", markersize=6,
                          alpha=0.8)
        axis.set(xscale="log", yscale="log")
        axis.set_title(f"{case[0]} + {case[1]}", fontsize=8)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(cases):]:
        axis.set_visible(False)
    figure.supxlabel("KL of the skill's answers from the target's own", fontsize=9)
    figure.supylabel("loss on passkeys in held-out text", fontsize=9)
    marks = [_pyplot().Line2D([], [], linestyle="", marker=MARKERS[k % len(MARKERS)],
                              color=f"C{k % 10}", label=merge) for k, merge in enumerate(merges)]
    figure.legend(handles=marks, loc="center right", fontsize=7)
    return _save(figure, path, right=1 - 2.4 / figure.get_figwidth())


def plot_ablations(rows: Sequence[Row], path: Path) -> Path | None:
    """KL of answers and loss on passkeys for each part of the delta and of the RoPE."""
    own = [row for row in rows if row["group"] == "ablations"]
    cases = list(dict.fromkeys((row["target"], row["long"]) for row in own))
    if not cases:
        return None
    own += [row for row in rows if row["group"] == "main" and (row["target"], row["long"]) in cases]
    merges = list(dict.fromkeys(row["merge"] for row in reversed(own)))
    figure, axes = _pyplot().subplots(1, 2, sharey=True, figsize=(11, 0.32 * len(merges) + 1.4))
    height = 0.8 / len(cases)
    for axis, value, title in ((axes[0], lambda row: (row["skill"] or row["text"])["kl"],
                                "KL of answers"),
                               (axes[1], key_loss, "loss on passkeys in held-out text")):
        for k, case in enumerate(cases):
            found = {row["merge"]: value(row) for row in own
                     if (row["target"], row["long"]) == case}
            axis.barh([i + (k - (len(cases) - 1) / 2) * height for i in range(len(merges))],
                      [found.get(merge, 0) for merge in merges], height=height, color=f"C{k}",
                      label=f"{case[0]} + {case[1]}")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25, axis="x")
    axes[0].set_yticks(range(len(merges)), merges, fontsize=8)
    axes[1].legend(fontsize=7)
    return _save(figure, path)


def _save(figure: Any, path: Path, right: float = 1.0) -> Path:
    figure.tight_layout(rect=(0, 0, right, 1))
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


PLOTS = {"rank": plot_rank, "drift": plot_drift, "mergers": plot_mergers,
         "ablations": plot_ablations}
