"""Numbers with their uncertainty."""

import math
from collections.abc import Sequence

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
