"""A lineage as text for a terminal and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.delta.conflict import Conflict
from extend.delta.lineage import VERDICTS, Lineage, numbers
from extend.delta.moments import Estimate, Moments
from extend.delta.pair import in_layer_order, is_vocabulary, layer_of

_LISTED = 8  # names in a note

_LEGEND = """\
cosine, drift   of the matrices: drift is ||target - base|| / ||base||
equal           elements of all parameters that are the same bit for bit
vectors         drift of norms and biases, which every model has near the same values"""
_CONFLICT_LEGEND = """\
deltas          cosine of the long delta and target - base
left, right     share of the long delta's energy in the leading output and input subspace, rank
                {rank}, of target - base; and as a multiple of what an unrelated one would hold"""


@dataclass(frozen=True, slots=True)
class Report:
    """A lineage, and what it was made from.

    Attributes:
        inputs: role -> path.
        options: rank and seed.
        conflict: matrix -> conflict with the long delta, None where no such delta was given.
    """

    inputs: Mapping[str, Path]
    options: Mapping[str, Any]
    lineage: Lineage
    conflict: Mapping[str, Conflict] | None = None

    def rows(self) -> dict[str, list[str]]:
        """Label -> parameters: every layer, then every parameter outside them."""
        layers = {str(layer): names for layer, names in self.lineage.layers().items()}
        outside = [name for name in in_layer_order(self.lineage.tensors) if layer_of(name) is None]
        return {**layers, **{name: [name] for name in outside}}

    def moments(self, names: Sequence[str]) -> tuple[Moments, Moments, Moments]:
        """Of a row's matrices, of its vectors, and of all of it.

        Outside the layers embedding and head count as matrices.
        """
        matrices = [n for n in names if n in self.lineage.matrices
                    or (layer_of(n) is None and is_vocabulary(n))]
        vectors = [name for name in names if name not in matrices]
        return tuple(map(self.lineage.part, (matrices, vectors, names)))

    def to_json(self) -> dict[str, Any]:
        """Everything, tensor by tensor; None stands for what is not defined, or not bounded."""
        found = self.lineage
        return {
            "schema": 1, "inputs": {role: str(path) for role, path in self.inputs.items()},
            "options": dict(self.options), **found.summary(), "advice": VERDICTS[found.kind][1],
            "unrelated_parts": found.unrelated_parts(), "vocabulary": found.vocabulary(),
            "resized": {name: list(rows) for name, rows in found.resized.items()},
            "only_base": list(found.only_base), "only_target": list(found.only_target),
            "conflict": self._conflict(found.matrices),
            "layers": {label: self._row_json(names) for label, names in self.rows().items()},
            "tensors": {name: numbers(m, m) for name, m in found.tensors.items()}}

    def _row_json(self, names: Sequence[str]) -> dict[str, Any]:
        matrices, vectors, everything = self.moments(names)
        return {**numbers(matrices, everything), "vectors": numbers(vectors, vectors)["drift"],
                "conflict": self._conflict(names)}

    def _conflict(self, names: Sequence[str] | frozenset[str]) -> dict[str, Any] | None:
        if self.conflict is None:
            return None
        parts = [self.conflict[name] for name in in_layer_order(names) if name in self.conflict]
        return Conflict.total(parts).to_json() if parts else None

    def to_text(self) -> str:
        """The verdict, one line a layer, and what is not in the table."""
        found = self.lineage
        base = self.inputs.get("base") or f"the base of {self.inputs['adapter']}"
        title = f"{self.inputs['target']} against {base}: {found.verdict()}"
        parts = [title, f"for a merge: {VERDICTS[found.kind][1]}", self._table(), _LEGEND]
        if found.sampled:
            cosine, drift = found.overall.cosine(), found.overall.drift()
            parts.insert(1, f"estimated from the adapter's sample of its base, 95 % intervals: "
                            f"cosine {cosine.text(6)}, drift {drift.text(3)}")
        if self.conflict is not None:
            parts[-1] += "\n" + _CONFLICT_LEGEND.format(rank=self.options["rank"])
        parts += [f"only in the {side}: {_listed(names)}" for side, names in (
            ("base", found.only_base), ("target", found.only_target)) if names]
        return "\n\n".join(parts)

    def _table(self) -> str:
        header = ["layer", "cosine", "drift", "equal", "vectors"]
        if self.conflict is not None:
            header += ["deltas", "left", "", "right", ""]
        found = self.lineage
        vectors = [name for names in found.layers().values() for name in names
                   if name not in found.matrices]
        rows = [self._cells(label, names) for label, names in self.rows().items()]
        total = self._cells("all layers", [*found.matrices, *vectors])
        return _align([header, *rows, total])

    def _cells(self, label: str, names: Sequence[str]) -> list[str]:
        matrices, vectors, everything = self.moments(names)
        cells = [label, _shown(matrices.cosine(), "{:.5f}"), _shown(matrices.drift(), "{:.4f}"),
                 _shown(everything.equal_fraction(), "{:.1%}"),
                 _shown(vectors.drift(), "{:.4f}")]
        if self.conflict is None:
            return cells
        shares = self._conflict(names)
        if shares is None:
            return [*cells, "", "", "", "", ""]
        return [*cells, _number(shares["cosine"], "{:+.3f}"), *_share(shares, "left"),
                *_share(shares, "right")]


def _share(shares: Mapping[str, float | None], side: str) -> list[str]:
    chance = shares[f"{side}_chance"]
    times = shares[side] / chance if chance else None
    return [_number(shares[side], "{:.1%}"), _number(times, "{:.1f}x")]


def _shown(value: Estimate | None, form: str) -> str:
    return _number(None if value is None else value.value, form)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)
