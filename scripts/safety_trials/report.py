"""results.json of all shares, the tables of what was kept, and the plots."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from extend.output import write_json

from .diagnostics import correlate
from .plots import plot_kept, plot_predictors
from .settings import NATIVE
from .trials import native_row

LEARNED = 0.5  # exact match below which a fine-tune has no skill that could be lost
Json = dict[str, Any]


def collect(out: Path) -> list[Path]:
    """Join the shares in `out`; write results.json, table.md and the plots, and return them.

    Raises:
        SystemExit: no share, none with the base, or shares of different runs.
    """
    shares = [json.loads(path.read_text(encoding="utf-8"))
              for path in sorted(out.glob("shard-*-of-*.json"))]
    results = join(shares, out)
    rows = trial_rows(results)
    names = [key for key in rows[0] if key.startswith("d: ")] if rows else []
    results["prediction"] = {outcome: correlate(rows, names, outcome)
                             for outcome in ("lost", "loss_rise", "kl")} if rows else {}
    write_json(out / "results.json", results)
    (out / "table.md").write_text(tables(results, rows), encoding="utf-8")
    made = [out / "results.json", out / "table.md"]
    if rows:
        made.append(plot_kept(rows, out / "skill-kept.png"))
        made.append(plot_predictors(rows, results["prediction"]["lost"], out / "predictors.png"))
    return made


def join(shares: Sequence[Json], out: Path) -> Json:
    if not shares:
        raise SystemExit(f"{out}: holds no shard-I-of-N.json; run the trials first")
    if any(share["settings"] != shares[0]["settings"] for share in shares):
        raise SystemExit(f"{out}: its shares were run with different RoPE settings; run them again "
                         "in an empty folder")
    bases = [share for share in shares if share["base"]]
    if len(bases) != 1:
        raise SystemExit(f"{out}: {len(bases)} shares hold the base's measures, and one should; a "
                         "share did not end, or shares of two runs lie there")
    first = bases[0]
    siblings = sorted((s for share in shares for s in share["siblings"]),
                      key=lambda s: (s["skill"], s["drift"]))
    return {**{key: first[key] for key in ("schema", "level", "about", "settings", "base",
                                           "longs")}, "siblings": siblings}


def learned(results: Json) -> list[Json]:
    """Siblings whose skill is there under their own RoPE."""
    return [s for s in results["siblings"] if native_row(s)["score"] >= LEARNED]


def trial_rows(results: Json) -> list[Json]:
    """One row for each learned sibling and changed RoPE, with outcomes and diagnostics.

    `kept` is the skill over the skill under the native RoPE, `lost` 1 - kept, `loss_rise` the
    rise of the answers' loss; diagnostics have names that begin with "d: ".
    """
    settings = {s["name"]: s for s in results["settings"]}
    base = {row["setting"]: row for row in results["base"]["rows"]}
    rows = []
    for sibling in learned(results):
        native = native_row(sibling)
        for row in sibling["rows"]:
            if row["setting"] == NATIVE:
                continue
            kept = row["score"] / native["score"]
            rows.append({
                **{key: settings[row["setting"]][key] for key in ("kind", "factor", "family")},
                "setting": row["setting"], "sibling": sibling["sibling"],
                "skill": sibling["skill"], "strength": sibling["strength"]["name"],
                "drift": sibling["drift"], "kept": kept, "lost": 1 - kept,
                "loss_rise": row["loss"] - native["loss"], "kl": row["kl"],
                **diagnostics(base[row["setting"]], base[NATIVE], sibling["skill"])})
    return rows


def diagnostics(row: Json, native: Json, skill: str) -> dict[str, float]:
    """What the base alone says of a setting."""
    measured = {"base text loss rise": row["text_loss"] - native["text_loss"],
                "base text KL": row["text_kl"], "noisy base text KL": row["noise_kl"],
                "base KL on the skill's answers": row["skills"][skill]["kl"]}
    known = {"setting", "text_loss", "text_kl", "noise_kl", "skills"}
    closed = {key: value for key, value in row.items() if key not in known}
    return {f"d: {key}": value for key, value in {**closed, **measured}.items()}


# ---- tables -------------------------------------------------------------------------------------

def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tables(results: Json, rows: Sequence[Json]) -> str:
    about = results["about"]
    intro = (f"{about['model']}, native length {about['native_len']}, theta "
             f"{about['rope_theta']:g}; {about['device']}, torch {about['torch']}, transformers "
             f"{about['transformers']}, commit {about['commit']}, seed {about['seed']}.\n")
    parts = [intro, "## The siblings\n", sibling_table(results)]
    if rows:
        parts += ["## Skill kept under each RoPE, without training\n", kept_table(results, rows),
                  "## Trials with 90 % kept, and mean kept\n", kind_table(rows)]
    if any(sibling["merged"] for sibling in results["siblings"]):
        parts += ["## Long models\n", long_table(results),
                  "## Skill kept by base + sibling's delta + long model's delta\n",
                  merged_table(results)]
    if rows:
        parts += ["## What foretells the loss of skill\n", prediction_table(results)]
    return "\n".join(parts)


def sibling_table(results: Json) -> str:
    base = next(row for row in results["base"]["rows"] if row["setting"] == NATIVE)
    lines = []
    for sibling in results["siblings"]:
        strength, native = sibling["strength"], native_row(sibling)
        lines.append([
            sibling["skill"], strength["name"], f"{strength['steps']} x {strength['lr']:g}",
            f"{sibling['drift']:.4f}", share(base["skills"][sibling["skill"]]), share(native),
            f"{sibling['text_loss'] - base['text_loss']:+.3f}"])
    return markdown(["skill", "fine-tune", "steps x lr", "drift", "base's skill",
                     "sibling's skill", "text loss against the base"], lines)


def share(row: Json) -> str:
    low, high = (round(100 * row[key]) for key in ("wilson_low", "wilson_high"))
    return f"{row['right']}/{row['n']} ({low}-{high} %)"


def kept_table(results: Json, rows: Sequence[Json]) -> str:
    """Kept share, mean over the fine-tunes of each skill, and the base's text loss."""
    skills = list(dict.fromkeys(row["skill"] for row in rows))
    base = {row["setting"]: row for row in results["base"]["rows"]}
    plain, lines = base[NATIVE]["text_loss"], []
    for setting in results["settings"][1:]:
        own = [row for row in rows if row["setting"] == setting["name"]]
        means = [fmean(r["kept"] for r in own if r["skill"] == skill) for skill in skills]
        lines.append([setting["name"], *(f"{mean:.2f}" for mean in means),
                      f"{min(row['kept'] for row in own):.2f}",
                      f"{fmean(row['kl'] for row in own):.3f}",
                      f"{base[setting['name']]['text_loss'] - plain:+.3f}",
                      f"{base[setting['name']]['movement']:.3f}"])
    return markdown(["RoPE", *skills, "worst sibling", "mean KL", "base's text loss", "movement"],
                    lines)


def kind_table(rows: Sequence[Json]) -> str:
    """For each method and factor: in how many siblings 90 % of the skill is kept; the mean."""
    factors = sorted({row["factor"] for row in rows})
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = []
        for factor in factors:
            own = [r["kept"] for r in rows if r["kind"] == kind and r["factor"] == factor]
            cells.append(f"{sum(kept >= 0.9 for kept in own)}/{len(own)} ({fmean(own):.2f})"
                         if own else "")
        lines.append([kind, *cells])
    return markdown(["RoPE", *(f"x{factor}" for factor in factors)], lines)


def long_table(results: Json) -> str:
    base = next(row for row in results["base"]["rows"] if row["setting"] == NATIVE)
    lines = [[long["name"], f"{long['drift']:.4f}",
              f"{long['text_loss'] - base['text_loss']:+.3f}", passkeys(long["passkey"])]
             for long in results["longs"]]
    return markdown(["RoPE", "drift", "text loss against the base", "passkeys found"], lines)


def passkeys(found: Mapping[str, Sequence[int]] | None) -> str:
    return ", ".join(f"{length}: {right}/{count}"
                     for length, (right, count) in (found or {}).items())


def merged_table(results: Json) -> str:
    """For each long model and skill, over the skill's siblings: share kept without and with it."""
    siblings = [s for s in learned(results) if s["merged"]]
    names = list(dict.fromkeys(m["long"] for s in siblings for m in s["merged"]))
    weights = sorted({m["weight"] for s in siblings for m in s["merged"]})
    lines = [[name, skill, *merged_cells([s for s in siblings if s["skill"] == skill], name,
                                         weights)]
             for name in names for skill in dict.fromkeys(s["skill"] for s in siblings)]
    return markdown(["long model", "skill", "siblings", "RoPE alone",
                     *(f"+ {weight:g} x delta" for weight in weights), "worst sibling, + delta",
                     "passkeys, medium + delta", "medium alone"], lines)


def merged_cells(siblings: Sequence[Json], long: str, weights: Sequence[float]) -> list[str]:
    native = [native_row(sibling)["score"] for sibling in siblings]
    alone = [row["score"] / own for sibling, own in zip(siblings, native, strict=True)
             for row in sibling["rows"] if row["setting"] == long]
    kept = {weight: [m["score"] / own for sibling, own in zip(siblings, native, strict=True)
                     for m in sibling["merged"] if (m["long"], m["weight"]) == (long, weight)]
            for weight in weights}
    merged = [m["passkey"] for s in siblings for m in s["merged"] if m["long"] == long]
    keys = (*filter(None, merged), None)[0]
    before = (*filter(None, (s["passkey"] for s in siblings)), None)[0]
    return [str(len(siblings)), f"{fmean(alone):.2f}",
            *(f"{fmean(kept[weight]):.2f}" for weight in weights), f"{min(kept[weights[-1]]):.2f}",
            passkeys(keys), passkeys(before)]


def prediction_table(results: Json) -> str:
    """Rank correlations with the skill lost, the strongest first."""
    found = results["prediction"]
    order = sorted(found["lost"], key=lambda name: -(found["lost"][name]["mean"] or -math.inf))
    skills = sorted({skill for own in found["lost"].values() for skill in own["skills"]})
    lines = []
    for name in order:
        own = found["lost"][name]
        lines.append([
            name.removeprefix("d: "), number(own["mean"]), number(own["lowest"]),
            *(number(own["skills"].get(skill)) for skill in skills),
            number(found["kl"][name]["mean"]), number(own["cut"], 3),
            f"{100 * own['cut_share']:.0f} %"])
    return ("Rank correlation over the RoPE settings within each sibling, mean over siblings.\n\n"
            + markdown(["number", "skill lost", "lowest", *skills, "KL of answers",
                        "best limit for 90 % kept", "told rightly"], lines))


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
