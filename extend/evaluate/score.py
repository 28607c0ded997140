"""Numbers with their uncertainty."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson_interval(successes: float, n: int, z: float = _Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion; it stays inside [0, 1] and holds for small n.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # At the ends the two terms cancel exactly on paper but not in floating point.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def proportion(successes: float, n: int) -> dict[str, float | int]:
    """`score`, `n`, `wilson_low` and `wilson_high` of so many right answers.

    Parts of answers count too: of values in [0, 1] none vary more than right and wrong.
    """
    low, high = wilson_interval(successes, n)
    return {"score": round(successes / n, 6), "n": n,
            "wilson_low": round(low, 6), "wilson_high": round(high, 6)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; a single value has none."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def string_match_all(text: str, references: Sequence[str]) -> float:
    """Share of the references that the text holds, whatever their case.

    Source: NVIDIA/RULER, scripts/eval/synthetic/constants.py.
    """
    text = text.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(text: str, references: Sequence[str]) -> float:
    """1 when the text holds one of the references, whatever its case; 0 otherwise.

    Source: NVIDIA/RULER, scripts/eval/synthetic/constants.py.
    """
    text = text.lower()
    return float(any(reference.lower() in text for reference in references))


def mean_of_tasks(entries: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """The unweighted mean of several tasks' scores, with an interval from theirs.

    The half-widths of the tasks' Wilson intervals are added as variances are, each side by itself
    (MOVER), so that tasks without a mistake keep their uncertainty; one task keeps its interval.

    Args:
        entries: of `proportion`, at least one.

    Source: Zou & Donner 2008, doi:10.1002/sim.3095, for a sum of independent terms.
    """
    share = 1 / len(entries)
    mean = math.fsum(e["score"] for e in entries) * share
    below = share * math.hypot(*(e["score"] - e["wilson_low"] for e in entries))
    above = share * math.hypot(*(e["wilson_high"] - e["score"] for e in entries))
    return {"score": round(mean, 6), "n": sum(e["n"] for e in entries), "tasks": len(entries),
            "wilson_low": round(max(0.0, mean - below), 6),
            "wilson_high": round(min(1.0, mean + above), 6)}


def difference(entry: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
    """`entry` less `other`: the difference of two scores and the ends of its 95 % interval.

    The scores are taken as independent. Those of two models on the same prompts mostly are not,
    and then the interval is wider than need be.

    Source: Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I,
    method 10.
    """
    gap = entry["score"] - other["score"]
    below = math.hypot(entry["score"] - entry["wilson_low"], other["wilson_high"] - other["score"])
    above = math.hypot(entry["wilson_high"] - entry["score"], other["score"] - other["wilson_low"])
    return gap, max(-1.0, gap - below), min(1.0, gap + above)


def difference_of_means(mean: float, stderr: float | None, other: float, other_stderr: float | None
                        ) -> tuple[float, float | None]:
    """The difference of two means and the half-width of its 95 % interval, None without errors."""
    if stderr is None or other_stderr is None:
        return mean - other, None
    return mean - other, _Z95 * math.hypot(stderr, other_stderr)
