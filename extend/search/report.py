"""search.json and the table: what was measured, what was chosen, and how it compares."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from extend.search.data import HELD_OUT, SEARCH
from extend.search.goals import EQUAL, RULES, best_analytic
from extend.search.lab import AXES, Lab, Result, describe
from extend.search.statistics import Statistics

SCHEMA = 1
COUNTING = ("one evaluation is one candidate at one length on one half of the data: its needle "
            "rows of that length and, the first time, short text and siblings; the model's own "
            "check at its native length counts too")
AXES_TEXT = {
    "needle": "nats a token of the answers to facts hidden in rows of the target length, half of "
              "the rows real text, half filler; only the answers' logits are computed",
    "short": "nats a token on windows of the native length",
    "siblings": "KL(own RoPE || candidate) in nats a token, mean over the siblings",
    "short_kl": "KL(unchanged model || candidate) in nats a token on the windows of short loss; no "
                "axis of the front, where the siblings' KL is one already and moves with it",
    "interval": "95 %, from a paired bootstrap over rows and their facts, and over windows, "
                "widened by Student's t because they are few; clusters tells how many",
}


class Outcome:
    """The results of a finished search, in the forms they are written in.

    Args:
        splits: half -> its statistics; held-out is absent when the budget left nothing for it.
        limit: needle loss at which the target counts as reached.
        keeps_window: whether the model has a sliding window that was kept.
    """

    def __init__(self, lab: Lab, target_len: int, chosen: Mapping[str, Result],
                 splits: Mapping[str, Statistics], limit: float, *, keeps_window: bool = False):
        self.limit, self.keeps_window = limit, keeps_window
        self.lab, self.target_len, self.chosen, self.splits = lab, target_len, chosen, splits
        self.results = {split: lab.results(target_len, split) for split in splits}

    def of(self, split: str, *origins: str) -> list[Result]:
        return [r for r in self.results.get(split, ()) if r.candidate.origin in origins]

    def same(self, split: str, result: Result) -> Result | None:
        """What the candidate of `result` gave on another half, if it was measured there."""
        return next((r for r in self.results.get(split, ())
                     if r.candidate.key == result.candidate.key), None)

    def front(self) -> dict[str, list[dict[str, Any]]]:
        """The Pareto front on all axes, and on needle against short loss."""
        fronts = {}
        offered = self.of(SEARCH, "native", "analytic", "theta", "curve")
        for name, axes in (("all_axes", [0, 1, 2]), ("needle_short", [0, 1])):
            inside, shares = self.splits[SEARCH].front(offered, axes)
            rows = [{"key": r.candidate.key, "name": r.candidate.name, "share_of_resamples": share,
                     **self.splits[SEARCH].describe(r)}
                    for r, member, share in zip(offered, inside, shares) if member]
            fronts[name] = sorted(rows, key=lambda row: row["needle"]["mean"])
        return fronts

    def comparison(self, split: str) -> dict[str, dict[str, Any]]:
        """Chosen setting -> each other analytic method -> differences, and whether it is matched.

        Matched: needle loss and short loss are both no larger, to `EQUAL`. Not surely worse:
        neither interval lies above that.
        """
        table: dict[str, dict[str, Any]] = {}
        for name, result in self.chosen.items():
            own = self.same(split, result)
            if own is None:
                continue
            table[name] = {}
            for other in self.of(split, "analytic"):
                if other.candidate.key == own.candidate.key:
                    continue
                difference = self.splits[split].difference(own, other)
                both = [difference[axis] for axis in AXES[:2]]
                table[name][other.candidate.name] = {
                    **difference, "matched": all(d["mean"] <= EQUAL for d in both),
                    "not_surely_worse": all(d["low"] <= EQUAL for d in both)}
        return table

    def verdict(self, split: str) -> dict[str, Any]:
        """How many other analytic methods the chosen settings match on needle and short loss."""
        comparison = self.comparison(split)
        methods = [r.candidate.name for r in self.of(split, "analytic")]
        told: dict[str, Any] = {"analytic_methods": len(methods)}
        for name, rows in comparison.items():
            told[name] = {"others": len(rows), **{
                kind: sum(row[kind] for row in rows.values())
                for kind in ("matched", "not_surely_worse")}}
        found = self.of(split, "theta", "curve")
        points = [r.point(self.target_len)[:2] for r in found]
        told["matched_by_some_setting"] = sum(
            any((p <= r.point(self.target_len)[:2] + EQUAL).all() for p in points)
            for r in self.of(split, "analytic"))
        return told

    def gain(self) -> dict[str, Any]:
        """The chosen settings against the analytic method with the least needle loss."""
        best = best_analytic(self.results[SEARCH], self.target_len)
        told: dict[str, Any] = {"analytic_choice": best.candidate.name}
        for split in self.splits:
            other = self.same(split, best)
            told[split] = {} if other is None else {
                name: self.splits[split].difference(own, other)
                for name, result in self.chosen.items()
                if (own := self.same(split, result)) is not None}
        return told

    def reached(self) -> dict[str, Any]:
        """Whether any setting that may be chosen reaches the target."""
        least = float(self.chosen["needle"].point(self.target_len)[0])
        return {"any": least <= self.limit, "least_needle_loss": least, "limit": self.limit}

    def screening(self, rungs: Sequence[int]) -> dict[str, Any]:
        """Rank correlation of needle loss at a screening length with that at the target."""
        told = {}
        for rung in rungs:
            pairs = [(np.mean(r.needle[rung]), np.mean(r.needle[self.target_len]))
                     for r in self.lab.results(rung) if self.target_len in r.needle]
            told[str(rung)] = {"candidates": len(pairs), "spearman": _spearman(pairs)}
        return told

    def to_json(self, rungs: Sequence[int]) -> dict[str, Any]:
        return {
            "axes": AXES_TEXT, "counting": COUNTING, "rules": RULES,
            "reached": self.reached(), "evaluations_used": self.lab.used, "budget": self.lab.budget,
            "chosen": {name: {**describe(r.candidate), "command_options": self.command(r),
                              **{split: self.splits[split].describe(own) for split in self.splits
                                 if (own := self.same(split, r)) is not None}}
                       for name, r in self.chosen.items()},
            "clusters": {split: own.clusters for split, own in self.splits.items()},
            "gain": self.gain(), "screening": self.screening(rungs),
            "verdict": {split: self.verdict(split) for split in self.splits},
            "comparison": {split: self.comparison(split) for split in self.splits},
            "front": self.front(),
            "table": {split: {r.candidate.name: self.splits[split].describe(r) for r in results}
                      for split, results in self.results.items()},
            "evaluations": [_evaluation(e) for e in self.lab.evaluations()]}

    def command(self, result: Result) -> str:
        """Arguments of `extend rescale` that write this setting."""
        pairs = (f"{key}={json.dumps(value, separators=(',', ':'))}"
                 for key, value in result.candidate.options.items())
        window = ["--sliding-window", "keep"] if self.keeps_window else []
        return shlex.join(["--to", str(self.target_len), "--method", str(result.candidate.method),
                           *window, *(part for pair in pairs for part in ("-o", pair))])

    def table(self) -> str:
        """Every analytic method and every chosen setting, best needle loss first."""
        split = HELD_OUT if HELD_OUT in self.splits else SEARCH
        native = next(r for r in self.results[SEARCH] if r.candidate.origin == "native")
        names = {r.candidate.key: name for name, r in reversed(self.chosen.items())}
        rows = [*self.of(SEARCH, "native", "analytic"),
                *{r.candidate.key: r for r in self.chosen.values()}.values()]
        unique = {r.candidate.key: r for r in rows}.values()
        lines = [_line("setting", "needle", f"needle, {split}", "short +", f"short +, {split}",
                       f"short KL, {split}", "siblings")]
        for result in sorted(unique, key=lambda r: float(r.point(self.target_len)[0])):
            label = result.candidate.name
            if result.candidate.key in names:
                chosen = [n for n, r in self.chosen.items()
                          if r.candidate.key == result.candidate.key]
                label = f"{label} <- {', '.join(chosen)}"
            lines.append(self._row(label, result, native, split))
        return "\n".join(lines)

    def _row(self, label: str, result: Result, native: Result, split: str) -> str:
        needle, short, siblings = result.point(self.target_len)
        base = native.point(self.target_len)[1]
        other, other_native = self.same(split, result), self.same(split, native)
        checked, excess, kl = "-", "-", "-"
        if other is not None:
            told = self.splits[split].describe(other)
            checked = _interval(told["needle"], 3, 2)
            kl = _interval(told["short_kl"], 4, 3)
            if other_native is not None:
                excess = f"{np.mean(other.short_loss) - np.mean(other_native.short_loss):+.4f}"
        return _line(label, f"{needle:.3f}", checked, f"{short - base:+.4f}", excess, kl,
                     f"{siblings:.4f}")


def rope_file(result: Result, target_len: int, model: Path) -> dict[str, Any]:
    """A chosen setting as a file: the method, its options, and the RoPE they stand for."""
    return {"schema": SCHEMA, "model": str(model), "to": target_len,
            "method": result.candidate.method, "options": dict(result.candidate.options),
            "rope": result.candidate.rope.to_json()}


def _interval(told: Mapping[str, float], digits: int, fewer: int) -> str:
    return (f"{told['mean']:.{digits}f} ({max(0.0, told['low']):.{fewer}f}-"
            f"{told['high']:.{fewer}f})")


def _line(*cells: str) -> str:
    first, *others = cells
    return f"{first:<64.64}" + "".join(f"{cell:>22}" for cell in others)


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    if len(pairs) < 3:
        return None
    ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0).astype(float)
    return float(np.corrcoef(ranks.T)[0, 1])


def _evaluation(evaluation: Any) -> dict[str, Any]:
    """Without the items, which are in the JSON lines beside it."""
    items = evaluation.items
    told = {"key": evaluation.candidate["key"], "name": evaluation.candidate["name"],
            "origin": evaluation.candidate["origin"], "length": evaluation.length,
            "split": evaluation.split, "needle": float(np.mean(items.needle)),
            "seconds": evaluation.seconds}
    if items.short_loss:
        told |= {"short": float(np.mean(items.short_loss)),
                 "short_kl": float(np.mean(items.short_kl)),
                 "siblings": {name: float(np.mean(v)) for name, v in items.siblings.items()}}
    return told
