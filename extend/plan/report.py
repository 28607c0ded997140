"""A plan as JSON and as text for a terminal."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from extend.model_config import RopeSpec
from extend.plan.rope import RopePlan, StagePlan

if TYPE_CHECKING:
    import torch

    from extend.rope.analysis import RopeAnalysis

UNCHANGED = "(unchanged)"
_WIDTH = 100  # columns

_LEGEND = """\
theta      base of the frequencies; the scaled kinds divide them on top of it
attn       factor of cos and sin
slowest    wavelength of the slowest pair, tokens
turn       pairs that complete a turn in the target length, and how many more than natively
unseen     pairs that meet angles in the target length which they never had in the native one
horizon    distance from which on attention may prefer random tokens to alike ones; a diagnostic
fp32       largest error of an fp32 angle near the target length, radians
moved      share of the rotation, over native distances, that a fine-tune of the native model no
           longer recognises: smaller tends to be safer to merge, but not what reads far back"""


def to_json(plan: RopePlan) -> dict[str, Any]:
    """The `rope` object of plan.json; None stands for infinity, and for a horizon out of reach."""
    native = plan.native
    return {
        "native_len": native.original_len, "target_len": plan.target_len, "factor": plan.factor,
        "rotary_dim": native.rotary_dim, "critical_index": plan.critical_index,
        "native": _method_json(plan.unchanged),
        "methods": {name: _method_json(found) for name, found in plan.methods.items()},
        "refused": dict(plan.refused),
        "schedule": None if not plan.stages else {
            "method": plan.method, "options": dict(plan.options),
            "stages": [_stage_json(stage) for stage in plan.stages],
            "warnings": list(plan.warnings)}}


def _method_json(found: "RopeAnalysis") -> dict[str, Any]:
    return {
        "theta": found.rope.rope_theta, "rope_type": found.rope.rope_type,
        "inv_freq": _numbers(found.inv_freq), "attention_factor": found.attention_factor,
        "full_pairs": found.full_pairs, "unseen_pairs": found.unseen_pairs,
        "horizon": found.horizon, "horizon_limit": found.horizon_limit,
        "angle_error": float(found.angle_error.max()), "movement": found.mean_movement,
        "pairs": {
            "wavelength": _numbers(found.wavelength), "native_turns": _numbers(found.native_turns),
            "turns": _numbers(found.turns), "state": found.states,
            "slowdown": _numbers(found.slowdown), "reach": _numbers(found.reach),
            "phase_shift_turns": _numbers(found.phase_shift),
            "movement": _numbers(found.movement), "angle_error": _numbers(found.angle_error)}}


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    return {"length": stage.made.target_len, "theta_in_steps": stage.in_steps.rope_theta,
            **_method_json(stage.made)}


def _numbers(values: "torch.Tensor") -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def methods_table(plan: RopePlan) -> str:
    """One line a method, the refused ones with their reasons, and what the columns mean."""
    native = plan.native
    title = (f"RoPE from {native.original_len:,} to {plan.target_len:,} tokens (factor "
             f"{plan.factor:.4g}): theta {_theta(native)}, {native.rotary_dim // 2} pairs, "
             f"critical index {plan.critical_index:.2f}")
    header = ["method", "theta", "kind", "attn", "slowest", "turn", "unseen", "horizon", "fp32",
              "moved"]
    rows = [_row(UNCHANGED, plan.unchanged)]
    rows += [_row(name, found) for name, found in plan.methods.items()]
    parts = [title, _align(header, rows), _LEGEND]
    if plan.refused:
        lines = [textwrap.fill(f"{name}: {reason}", _WIDTH, initial_indent="  ",
                               subsequent_indent="      ") for name, reason in plan.refused.items()]
        parts.insert(2, "\n".join(["not applied", *lines]))
    return "\n\n".join(parts)


def _row(name: str, found: "RopeAnalysis") -> list[str]:
    kind = "" if found.rope.rope_type == "default" else found.rope.rope_type
    return [name, _theta(found.rope), kind, f"{found.attention_factor:.4g}",
            _tokens(float(found.wavelength[-1])), _turning(found), str(found.unseen_pairs),
            _horizon(found), f"{float(found.angle_error.max()):.2g}",
            f"{found.mean_movement:.3f}"]


def _turning(found: "RopeAnalysis") -> str:
    more = found.full_pairs - int((found.native_turns >= 1).sum())
    return f"{found.full_pairs} {more:+d}" if more else f"{found.full_pairs}   "


def schedule_table(plan: RopePlan) -> str:
    """One line a stage, and what is wrong with the schedule."""
    differs = bool(plan.warnings)
    header = ["length", "theta", *(["theta in steps"] if differs else []), "attn", "slowest",
              "turn", "unseen", "horizon", "moved"]
    rows = []
    for stage in plan.stages:
        cells = _row("", stage.made)
        steps = [_theta(stage.in_steps)] if differs else []
        rows.append([f"{stage.made.target_len:,}", cells[1], *steps, *cells[3:8], cells[9]])
    return "\n\n".join([f"stages with {plan.method}", _align(header, rows), *plan.warnings])


def pairs_table(plan: RopePlan) -> str:
    """One line a pair of the chosen method; of its refusal, if it cannot be applied."""
    if plan.method not in plan.methods:
        return f"{plan.method} cannot be applied: {plan.refused[plan.method]}"
    found, before = plan.methods[plan.method], plan.unchanged
    header = ["pair", "native wavelength", "wavelength", "slower by", "native turns",
              "target turns", "completes", "off by, turns", "moved", "fp32"]
    columns = zip(before.wavelength.tolist(), found.wavelength.tolist(), found.slowdown.tolist(),
                  found.native_turns.tolist(), found.turns.tolist(), found.states,
                  found.phase_shift.tolist(), found.movement.tolist(), found.angle_error.tolist())
    rows = [[str(i), _tokens(old), _tokens(new), f"{slow:.4g}", f"{native:.4g}", f"{turns:.4g}",
             state, f"{shift:.3g}", f"{moved:.3f}", f"{error:.1e}"]
            for i, (old, new, slow, native, turns, state, shift, moved, error)
            in enumerate(columns)]
    return f"pairs of {plan.method}\n\n{_align(header, rows)}"


def _theta(rope: RopeSpec) -> str:
    return f"{rope.rope_theta:,.0f}" if rope.rope_theta >= 1000 else f"{rope.rope_theta:g}"


def _tokens(count: float) -> str:
    if not math.isfinite(count):
        return "never"
    return f"{count:,.0f}" if count >= 1000 else f"{count:.4g}"


def _horizon(found: "RopeAnalysis") -> str:
    if found.horizon is None:
        return f"> {found.horizon_limit:,}"
    return f"{found.horizon:,}"


def _align(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns two blanks apart, the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)

