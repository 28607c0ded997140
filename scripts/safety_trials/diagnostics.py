"""Numbers that might tell beforehand which RoPE change takes a sibling's skill.

Some need no model (how far each pair moves), the others are measured on the base alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from extend.model_config import RopeSpec
from extend.rope.analysis import pair_movement
from extend.rope.frequencies import inv_freq, turns

HORIZONS = (8, 32, 128, 512)  # tokens
SHARE_TURNS = 4  # pairs with more turns in the native length count as fast


def closed_form(native: RopeSpec, changed: RopeSpec) -> dict[str, float]:
    """Diagnostics from frequencies alone; all are 0 where nothing changes.

    - `movement`: mean over pairs of `extend.rope.analysis.pair_movement`.
    - `log ratio`: mean over pairs of |ln(f / f')|; `fast log ratio`: over pairs that turn more than
      four times in the native length.
    - `turn-weighted`: |1 - f'/f| averaged with the native turns as weights.
    - `capped turns`: the same with at most 32 turns counted.
    - `kernel N`: mean over pairs and distances 1..N of 1 - cos(m (f - f')).
    """
    before, after = inv_freq(native), inv_freq(changed)
    ratio, count = (before / after).log().abs(), turns(native)
    lost, capped = (1 - after / before).abs(), count.clamp(max=32)
    found = {"movement": float(pair_movement(before, after, native.original_len).mean()),
             "log ratio": float(ratio.mean()),
             "fast log ratio": float(ratio[count > SHARE_TURNS].mean()),
             "turn-weighted": float((lost * count).sum() / count.sum()),
             "capped turns": float((lost * capped).sum() / capped.sum())}
    for horizon in sorted({*HORIZONS, native.original_len}):
        angles = torch.arange(1, horizon + 1).double()[:, None] * (before - after)
        found[f"kernel {horizon}"] = float((1 - angles.cos()).mean())
    return found


def add_noise(weights: Mapping[str, Tensor], drift: float, seed: int) -> dict[str, Tensor]:
    """A random delta of the matrices in the layers: drift x each one's root mean square."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {n: w for n, w in weights.items() if ".layers." in n and w.ndim == 2}
    return {name: torch.randn(w.shape, generator=generator).to(w.device)
            * (drift * w.square().mean().sqrt()) for name, w in matrices.items()}


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found, begin = [0.0] * len(values), 0
    while begin < len(order):
        end = begin
        while end < len(order) and values[order[end]] == values[order[begin]]:
            end += 1
        for i in order[begin:end]:
            found[i] = (begin + 1 + end) / 2
        begin = end
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation with ties, or None where one of them is constant."""
    x, y = ranks(a), ranks(b)
    mean = (len(x) + 1) / 2
    both = math.fsum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    spread = math.fsum((i - mean) ** 2 for i in x) * math.fsum((j - mean) ** 2 for j in y)
    return both / spread**0.5 if spread else None


def best_cut(values: Sequence[float], kept: Sequence[bool]) -> tuple[float, float]:
    """The limit on `values` that tells kept from lost best, and the share it tells rightly.

    `values` at or below the limit are foretold as kept.
    """
    limits = [-math.inf, *sorted(set(values))]
    scored = [(sum((v <= limit) == k for v, k in zip(values, kept, strict=True)) / len(kept), limit)
              for limit in limits]
    share, limit = max(scored, key=lambda pair: pair[0])
    return limit, share


def correlate(rows: Sequence[Mapping[str, Any]], names: Sequence[str],
              outcome: str) -> dict[str, dict[str, Any]]:
    """How each diagnostic goes with `outcome` over the RoPE settings of every sibling.

    Args:
        rows: one per sibling and setting, with `sibling`, `skill`, `kept`, `outcome` and every
            diagnostic.

    Returns:
        diagnostic -> `mean` and `lowest` over siblings of the rank correlation within each,
        `skills` (the mean over each skill's siblings), `cut` and `cut_share` (see `best_cut`).
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["skill"], row["sibling"]), []).append(row)
    table = {}
    for name in names:
        inside = [(skill, spearman([r[name] for r in group], [r[outcome] for r in group]))
                  for (skill, _), group in groups.items()]
        inside = [(skill, value) for skill, value in inside if value is not None]
        skills = {skill: _mean([value for own, value in inside if own == skill])
                  for skill, _ in inside}
        cut, share = best_cut([r[name] for r in rows], [r["kept"] >= 0.9 for r in rows])
        table[name] = {"mean": _mean([value for _, value in inside]),
                       "lowest": min((value for _, value in inside), default=None),
                       "skills": skills, "cut": cut if math.isfinite(cut) else None,
                       "cut_share": share}
    return table


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
