"""A stand-in for a model: losses in closed form of the factors, with an item-wise noise."""

import numpy as np

from extend.model_config import RopeSpec
from extend.search.candidates import features

SPEC = RopeSpec(rope_theta=1e5, rotary_dim=32, original_len=1024)
TARGET_LEN = 8192
ITEMS = 24


class FakeMeter:
    """Needle loss is least where slow pairs are divided by 10, short loss where none is moved.

    Attributes:
        calls: (kind, length, half) of every measurement.
        fail_after: raise KeyboardInterrupt once so many needle measurements were made.
    """

    def __init__(self, noise: float = 0.05, fail_after: int | None = None):
        self.noise, self.fail_after = noise, fail_after
        self.calls: list[tuple[str, int, str]] = []

    def needle(self, rope: RopeSpec, length: int, split: str) -> list[float]:
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append(("needle", length, split))
        changed = features(SPEC, rope)
        slow = changed[10:16] - np.log(10.0)
        level = 0.1 + 0.5 * (slow ** 2).mean() + 0.2 * (changed[:6] ** 2).mean()
        share = np.log(length / 512) / np.log(TARGET_LEN / 512)
        return self._items(0.05 + level * share, split)

    def short(self, rope: RopeSpec, split: str) -> tuple[list[float], list[float]]:
        self.calls.append(("short", 0, split))
        excess = self._excess(rope)
        return self._items(3.0 + excess, split), self._items(excess, split, 0.0)

    def disturbance(self, rope: RopeSpec, split: str) -> dict[str, list[float]]:
        return {"one": self._items(2 * self._excess(rope), split, 0.0),
                "two": self._items(self._excess(rope), split, 0.0)}

    def _excess(self, rope: RopeSpec) -> float:
        changed = features(SPEC, rope)
        weights = np.exp(-np.arange(16) / 3)
        return float((weights * changed[:16] ** 2).sum() * 0.1 + 0.05 * abs(changed[16]))

    def _items(self, level: float, split: str, noise: float | None = None) -> list[float]:
        """Common random numbers: the same for every setting."""
        rng = np.random.default_rng(len(split))
        factors = np.exp((self.noise if noise is None else noise) * rng.standard_normal(ITEMS))
        return (level * factors).tolist()
