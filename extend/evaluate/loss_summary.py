"""What results.json says at its top of losses, of curves by position, and of divergences."""

from collections.abc import Mapping, Sequence
from typing import Any

from extend.results import format_length

Row = Mapping[str, Any]

_MEAN = ("loss", "stderr", "n", "tokens", "length")
_KEYS = {
    "losses": (*_MEAN, "perplexity", "key_tokens", "key_sha256"),
    "curves": (*_MEAN, "native", "slope_per_doubling", "slope_stderr", "rises", "verdict",
               "joined", "short", "short_loss", "excess", "excess_stderr", "curve"),
    "divergences": (*_MEAN, "reference_loss", "difference", "difference_stderr", "kl",
                    "kl_stderr", "agreement", "agreement_stderr", "reference")}


def summarize_losses(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """`losses`, `curves` (by position) and `divergences` (from another model), by name.

    A task that was asked at several lengths has its name with each of them, a control its name
    with that of the control. Rows without a number, such as a text without key tokens, are left
    out.
    """
    found: dict[str, dict[str, Any]] = {kind: {} for kind in _KEYS}
    losses = [row for row in rows if row["score"] is None and row.get("loss") is not None]
    for row in losses:
        kind = "curves" if "curve" in row else "divergences" if "kl" in row else "losses"
        found[kind][_label(row, losses)] = {key: row[key] for key in _KEYS[kind] if key in row}
    return found


def _label(row: Row, rows: Sequence[Row]) -> str:
    lengths = {other["length"] for other in rows
               if other["name"] == row["name"] and other.get("control") is None}
    text = f"{row['name']} {format_length(row['length'])}" if len(lengths) > 1 else row["name"]
    return text if row.get("control") is None else f"{text}, {row['control']}"
