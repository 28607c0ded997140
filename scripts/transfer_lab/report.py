"""results.json and table.md of whatever rows a run has, and the plots."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safety_trials.diagnostics import spearman
from safety_trials.report import markdown, share

from extend.output import write_json

from . import plots
from .plan import ALONE

LEARNED = 0.5  # exact match of a target below which it has no skill that could be lost
PREDICTORS = ("KL under the RoPE alone", "movement", "long_drift", "target_drift", "drift_ratio",
              "cosine", "overlap_left", "overlap_right")
OUTCOMES = ("KL of answers", "skill lost", "text KL")
Row = Mapping[str, Any]
TITLES = {
    "main": "Every target with every long model",
    "rank": "Rank", "norms": "Norms", "embeddings": "Embeddings", "ablations": "What decides it",
    "mergers": "Mergers", "learned": "Mergers that learn from unlabelled prompts of the skill",
    "learned-other": "Mergers that learn from other prompts, or from none",
    "far": "Longer contexts"}
NOTES = {
    "rank": "Bytes are those of the factors in bfloat16; norms, in fp32, come on top of them. The "
            "residual is that of all matrices together, for the noise rule that of the delta of "
            "two checkpoints stored in bfloat16.",
    "norms": "All with the norms' deltas unless the name says otherwise; folded ones are in the "
             "linear layers that read what a norm scales, the last norm is left out.",
    "embeddings": "The long model's embedding was trained too.",
    "ablations": "Shuffled: rows and columns permuted with random signs, so that the singular "
                 "values stay. Random: Gaussian of each tensor's norm. Pairs: the delta whole, but "
                 "only pairs that turn so often in the native length get the long model's "
                 "frequencies.",
    "mergers": "Orthogonal: without the part of the delta in the leading singular subspaces of the "
               "target's own. TIES takes the place of both deltas; DARE drops half of the long "
               "model's.",
    "learned": "Half of the prompts and of the long rows is learned from, half decides when to "
               "stop.",
    "learned-other": "Other: pieces of text that have nothing to do with the skill. No prompts: "
                     "what the target writes by itself."}


def collect(out: Path) -> list[Path]:
    """Join the units in `out`; write results.json, table.md and the plots, and return them.

    Raises:
        SystemExit: no rows yet.
    """
    units = [json.loads(path.read_text(encoding="utf-8"))
             for path in sorted((out / "units").glob("*.json"))]
    if not units:
        raise SystemExit(f"{out}: holds no units; run the trials first")
    results = join(units)
    rows = results["rows"]
    write_json(out / "results.json", results)
    (out / "table.md").write_text(tables(results), encoding="utf-8")
    return [out / "results.json", out / "table.md", *plots.draw(rows, out)]


def join(units: Sequence[Row]) -> dict[str, Any]:
    """All rows, each with what is known of its target alone."""
    alone = {unit["target"]: unit["rows"][0] for unit in units if unit["group"] == "alone"}
    rows = [{**{key: unit[key] for key in ("group", "target", "skill_name", "steps", "long")},
             **row, "kept": kept(row, alone.get(unit["target"])),
             "text_rise": rise(row, alone.get(unit["target"]))}
            for unit in units for row in unit["rows"]]
    abouts = [json.loads(text) for text in sorted({json.dumps(unit["about"]) for unit in units})]
    return {"schema": 1, "about": abouts, "rows": rows, "correlations": correlations(rows)}


def kept(row: Row, alone: Row | None) -> float | None:
    """Skill over that of the target alone; None where the target has none to lose."""
    if not row["skill"] or alone is None or alone["skill"]["score"] < LEARNED:
        return None
    return row["skill"]["score"] / alone["skill"]["score"]


def rise(row: Row, alone: Row | None) -> float | None:
    """Loss of short text, less that of the target alone."""
    return None if alone is None else row["text"]["loss"] - alone["text"]["loss"]


# ---- what foretells it ---------------------------------------------------------------------------

def correlations(rows: Sequence[Row]) -> dict[str, Any]:
    """Rank correlation, over pairs of target and long model, of numbers with what the merge costs.

    The merge is that of the whole delta. Skill lost is over targets that had learned theirs.
    """
    pairs = list(pair_numbers(rows))
    return {"pairs": len(pairs), "learned": sum(p["skill lost"] is not None for p in pairs),
            **{outcome: {name: _correlation(pairs, name, outcome) for name in PREDICTORS}
               for outcome in OUTCOMES}}


def pair_numbers(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    main = [row for row in rows if row["group"] == "main" and row["skill"]]
    alone = {(r["target"], r["long"]): r for r in main if r["merge"] == "RoPE alone"}
    for row in main:
        rope = alone.get((row["target"], row["long"]))
        if row["merge"] != "whole" or rope is None:
            continue
        yield {**rope["numbers"], "KL under the RoPE alone": rope["skill"]["kl"],
               "KL of answers": row["skill"]["kl"], "text KL": row["text"]["kl"],
               "skill lost": None if row["kept"] is None else 1 - row["kept"]}


def _correlation(pairs: Sequence[Row], name: str, outcome: str) -> float | None:
    both = [(p[name], p[outcome]) for p in pairs if p[outcome] is not None]
    return spearman(*map(list, zip(*both, strict=True))) if len(both) > 2 else None


# ---- tables --------------------------------------------------------------------------------------

def tables(results: Row) -> str:
    rows = results["rows"]
    about = "; ".join(f"{a['device']}, torch {a['torch']}, transformers {a['transformers']}, "
                      f"commit {a['commit']}, seed {a['seed']}" for a in results["about"])
    first = results["about"][0]
    parts = [f"{first['model']}, native length {first['native_len']}, theta "
             f"{first['rope_theta']:g}; {about}.\n",
             "KL: of the skill's answers, from those of the target alone under its own RoPE, nats "
             "a token. Text: loss of short text less that of the target alone. Passkeys: found in "
             "filler / in held-out text, and the loss on those in text.\n",
             "## The targets alone\n", alone_table(rows)]
    for group, title in TITLES.items():
        own = [row for row in rows if row["group"] == group]
        if own:
            parts += [f"## {title}\n", *([NOTES[group] + "\n"] if group in NOTES else []),
                      group_table(own)]
    if any(row["group"] == "main" for row in rows):
        parts += ["## What foretells the cost\n", correlation_table(results["correlations"])]
    return "\n".join(parts)


def alone_table(rows: Iterable[Row]) -> str:
    lines = [[row["target"], f"{row['numbers']['target_drift']:.4f}", skill_cell(row),
              f"{row['text']['loss']:.3f}", passkey_cell(row)]
             for row in sorted(rows, key=_order) if row["long"] == ALONE]
    return markdown(["target", "drift", "skill", "text loss", "passkeys"], lines)


def group_table(rows: Sequence[Row]) -> str:
    """One line a row; numbers that the group's recipes tell come last."""
    extra = [key for key in ("mean_rank", "adapter_bytes", "residual", "share", "learn_seconds",
                             "kept_step") if any(key in row["numbers"] for row in rows)]
    lines = [[row["long"], row["target"], row["merge"], skill_cell(row),
              number(row["skill"] and row["skill"]["kl"]), number(row["text_rise"], "+.3f"),
              passkey_cell(row), *(extra_cell(row["numbers"], key) for key in extra)]
             for row in sorted(rows, key=_order)]
    return markdown(["long model", "target", "merge", "skill", "KL", "text", "passkeys",
                     *(key.replace("_", " ") for key in extra)], lines)


def _order(row: Row) -> tuple[Any, ...]:
    """By long model, then by target; rows of one unit stay in their order."""
    return row["long"], row["skill_name"] or "", -row["steps"]


def skill_cell(row: Row) -> str:
    return share(row["skill"]) if row["skill"] else ""


def passkey_cell(row: Row) -> str:
    """Found in filler / in text, and the loss on the keys in text, for every length."""
    return ", ".join(
        f"{length}: " + " / ".join(f"{found['right']}" for found in kinds.values())
        + f" of {kinds['text']['n']} ({kinds['text']['loss']:.2f})"
        for length, kinds in row["passkey"].items())


def extra_cell(numbers: Row, key: str) -> str:
    value = numbers.get(key)
    if value is None:
        return ""
    formats = {"adapter_bytes": lambda v: f"{v / 2**20:.2f} MiB", "mean_rank": lambda v: f"{v:.1f}",
               "learn_seconds": lambda v: f"{v:.1f}", "kept_step": str}
    return formats.get(key, lambda v: f"{v:.3f}")(value)


def number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def correlation_table(found: Row) -> str:
    lines = [[name, *(number(found[outcome][name], ".2f") for outcome in OUTCOMES)]
             for name in PREDICTORS]
    return (f"Rank correlation over {found['pairs']} pairs of target and long model, whole delta "
            f"({found['learned']} of them with a skill to lose).\n\n"
            + markdown(["number", *OUTCOMES], lines))
