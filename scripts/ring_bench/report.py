"""ring.json as Markdown tables and as a plot."""

from pathlib import Path
from typing import Any

Row = dict[str, Any]
MASK_SECTIONS = ("time", "packed", "window")


def markdown(result: Row) -> str:
    """All sections as tables, what was not measured included."""
    lines = [f"# Ring attention on {result['world']} x {result['gpu']}", ""]
    lines += [f"`{result['command']}`", ""]
    lines += [f"Commit {result['commit']}, torch {result['torch']}, {result['libraries']}, "
              f"{result['date']}. {result['shape']}, causal. Times are medians over rounds, of the "
              "slowest rank. Efficiency is (one GPU's time / GPUs) / time, median over rounds: "
              "`best` against the fastest kernel on one GPU, `same` against the same kernel, "
              "`local` against the same kernel on the local length alone (ring-flash-attn's way: "
              "GPUs times that / time).", ""]  # fmt: skip
    for section in MASK_SECTIONS:
        for group in result.get(section, []):
            lines += time_table(group)
    for section, write in SECTION_TABLES.items():
        if result.get(section):
            lines += write(result[section])
    dropped = result.get("dropped", [])
    lines += ["## Dropped for lack of time", "", *(f"- {text}" for text in dropped or ["nothing"])]
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def time_table(group: Row) -> list[str]:
    """One problem: a line for each contender, forward and forward + backward side by side."""
    lines = [f"## {group['mask']}, {group['seq_len']} tokens "
             f"({group['rounds']} of {group['rounds_wanted']} rounds)", ""]  # fmt: skip
    by_name: dict[str, dict[str, Row]] = {}
    for row in group["rows"]:
        by_name.setdefault(row["name"], {})[row["kind"]] = row
    rows = []
    for name, kinds in by_name.items():
        cells = [name + heads_note(kinds["fwd"])]
        for kind in ("fwd", "fwd+bwd"):
            row = kinds[kind]
            cells += [f"{row['ms']:.3f}", f"{row['tflops_per_gpu']:.0f}"]
            cells += [number(row.get(f"eff_{against}")) for against in ("best", "same", "local")]
        rows.append(cells)
    head = ["", "fwd ms", "TFLOP/s/GPU", "best", "same", "local"]
    head += ["fwd+bwd ms", "TFLOP/s/GPU", "best", "same", "local"]
    lines += table(head, rows) if rows else []
    reasons: dict[str, list[str]] = {}
    for who, why in group["not_measured"].items():
        reasons.setdefault(why, []).append(who)
    lines += [f"- not measured: {', '.join(who)}: {why}" for why, who in reasons.items()]
    return [*lines, ""]


def heads_note(row: Row) -> str:
    scale = row["heads_scale"]
    return f" (1/{scale} of the heads, time x {scale})" if scale > 1 else ""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def accuracy_table(accuracy: Row) -> list[str]:
    """The worst case of every contender and mask, then every failure and refusal."""
    rows = accuracy["rows"]
    states = [row["state"] for row in rows]
    lines = ["## Accuracy", "",
             "Error of out, dq, dk and dv as a fraction of what is allowed (2.5 times one flash "
             f"call's + 2e-3): {states.count('ok')} cases ok, {states.count('refused')} refused, "
             f"{states.count('failed')} failed, {accuracy['dropped']} dropped.", ""]  # fmt: skip
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["name"], row["mask"]
        if "used" in row and row["used"] >= worst.get(key, {"used": -1})["used"]:
            worst[key] = row
    lines += table(["", "mask", "worst", "of", "in"], [
        [name, mask, f"{row['used']:.2f}", row["reason"], row["shape"]]
        for (name, mask), row in worst.items()
    ])  # fmt: skip
    others: dict[str, list[str]] = {}
    for row in rows:
        if row["state"] != "ok":
            case = f"{row['name']} {row['mask']} {row['shape']}"
            others.setdefault(f"{row['state']}: {row['reason']}", []).append(case)
    lines += [f"- failed: {name} refused everything" for name in accuracy["idle"]]
    return lines + [f"- {why} ({'; '.join(cases)})" for why, cases in sorted(others.items())] + [""]


def memory_table(rows: list[Row]) -> list[str]:
    """MiB on the rank that needs most."""
    columns = ("path", "outside_allocator", "local", "workspace")
    cells = []
    for row in rows:
        sizes = [f"{row[name] / 2**20:.0f}" if name in row else "" for name in columns]
        ratios = [number(row.get(name)) for name in ("ratio", "ratio_without_workspace")]
        cells.append([row["name"], row["mask"], str(row["seq_len"]), *sizes, *ratios,
                      row.get("reason", "")])  # fmt: skip
    head = ["", "mask", "tokens", "path MiB", "of it outside the allocator",
            "local tensors + 2 KV blocks", "kernel's workspace", "ratio", "without workspace",
            "not measured"]  # fmt: skip
    return ["## Peak memory", "", *table(head, cells)]


def calibration_table(calibration: Row) -> list[str]:
    """The fitted rates, and the model's predictions for what was timed."""
    lines = ["## Cost model", ""]
    rows = []
    for kernel, hardware in calibration["kernels"].items():
        rates = hardware["kernel"]
        rows.append([kernel] + [
            f"{rates[kind]['peak'] / 1e12:.0f} at half {rates[kind]['half']:.0f}"
            for kind in ("square", "rectangle", "square_backward", "rectangle_backward")
        ])  # fmt: skip
    head = ["kernel, TFLOP/s", "square", "rectangle", "square backward", "rectangle backward"]
    lines += table(head, rows)
    if calibration["hardware"]:
        links = calibration["hardware"]
        lines += [f"Pull {links['pull']['bandwidth'] / 1e9:.0f} GB/s, NCCL "
                  f"{links['nccl']['bandwidth'] / 1e9:.0f} GB/s, memory "
                  f"{links['memory_bandwidth'] / 1e12:.2f} TB/s.", ""]  # fmt: skip
    lines += [f"- not measured: {who}: {why}" for who, why in calibration["not_measured"].items()]
    rows = [
        [row["name"], str(row["seq_len"]), row["kind"], f"{row['ms']:.3f}",
         f"{row['predicted_ms']:.3f}", f"{row['predicted_ms'] / row['ms']:.3f}"]
        for row in calibration.get("predictions", [])
    ]  # fmt: skip
    head = ["", "tokens", "", "measured ms", "predicted ms", "predicted / measured"]
    return [*lines, "", *table(head, rows)] if rows else [*lines, ""]


def profile_table(rows: list[Row]) -> list[str]:
    """Milliseconds of the first rank's traced calls."""
    columns = ("span_ms", "compute_ms", "transfer_ms", "exposed_ms", "idle_ms")
    cells = [[row["name"], str(row["seq_len"]), *(number(row.get(name)) for name in columns),
              row.get("reason", "")] for row in rows]  # fmt: skip
    head = ["", "tokens", "ms traced", "computing", "moving", "only moving", "idle", "not measured"]
    return ["## Profile", "", *table(head, cells)]


SECTION_TABLES = {
    "accuracy": accuracy_table,
    "memory": memory_table,
    "calibration": calibration_table,
    "profile": profile_table,
}


def plot(result: Row, path: Path) -> None:
    """Efficiency over tokens, forward and with backward, and TFLOP/s per GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 6), constrained_layout=True)
    specs = (("fwd", "eff_best", "forward: efficiency"),
             ("fwd+bwd", "eff_best", "forward + backward: efficiency"),
             ("fwd+bwd", "tflops_per_gpu", "forward + backward: TFLOP/s per GPU"))  # fmt: skip
    groups = [group for group in result.get("time", []) if group["rows"]]
    styles = line_styles(groups)
    for panel, (kind, field, title) in zip(panels, specs, strict=True):
        for name, style in styles.items():
            points = [(group["seq_len"], row[field]) for group in groups for row in group["rows"]
                      if row["name"] == name and row["kind"] == kind
                      and row.get(field) is not None]  # fmt: skip
            if points:
                panel.plot(*zip(*sorted(points), strict=True), label=name, **style)
        if field == "eff_best":
            panel.axhline(1, color="0.6", linewidth=1)
        decorate(panel, title, groups)
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()
               if not line.get_label().startswith("_")}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{result['world']} x {result['gpu']}, {result['shape']}, causal; "
                    "against the fastest kernel on one GPU", fontsize=11)  # fmt: skip
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def line_styles(groups: list[Row]) -> dict[str, Row]:
    """Ours: a colour for each strategy, a marker for each kernel; peers dashed; one GPU dotted."""
    found = {row["name"]: (row["family"], row["kernel"]) for g in groups for row in g["rows"]}
    kernels = sorted({kernel for family, kernel in found.values() if family != "peer"})
    ours = list(dict.fromkeys(n.partition(" ")[0] for n, (f, _) in found.items() if f == "ours"))
    peers = [name for name, (family, _) in found.items() if family == "peer"]
    styles = {}
    for name, (family, kernel) in found.items():
        style = {"marker": "osv^DPX"[kernels.index(kernel) % 7] if kernel in kernels else "o",
                 "color": "0.6", "linestyle": ":", "linewidth": 1.2, "markersize": 5}  # fmt: skip
        if family == "ours":
            style |= {"color": f"C{ours.index(name.partition(' ')[0]) % 10}", "linestyle": "-"}
        elif family == "peer":
            number = peers.index(name)
            shade = f"{0.1 + 0.6 * number / len(peers):.2f}"
            style |= {"color": shade, "linestyle": "--", "marker": "x+1234*|_"[number % 9]}
        styles[name] = style
    return styles


def decorate(panel: Any, title: str, groups: list[Row]) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("tokens, all GPUs together")
    panel.set_xscale("log", base=2)
    lengths = sorted({group["seq_len"] for group in groups})
    labels = [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths]
    panel.set_xticks(lengths, labels)
    panel.grid(alpha=0.3)
