"""What a merge was asked for, in one form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extend.errors import RecipeError
from extend.merge.methods import Method, make_method

Paths = Path | str | Sequence[Path | str] | None
Weights = float | Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `merge`, with adapters and weights as tuples of equal order.

    Attributes:
        weights: one for each adapter, then one for tuned - base if there is such a delta.
    """

    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    target: Path
    out: Path
    tuned: Path | None
    base: Path | None
    method: str
    options: Mapping[str, Any]
    layer_weights: Any
    sidecar: bool
    dtype: str | None
    rope_from: Path | None
    overwrite: bool

    @classmethod
    def of(cls, adapter: Paths, target: Path | str, out: Path | str, *, weight: Weights = 1.0,
           tuned: Path | str | None = None, base: Path | str | None = None, method: str = "add",
           options: Mapping[str, Any] | None = None, layer_weights: Any = None,
           sidecar: bool = True, dtype: str | None = None, rope_from: Path | str | None = None,
           overwrite: bool = False) -> "Request":
        """Take the arguments as `merge` does.

        Raises:
            RecipeError: no delta at all, or a number of weights that is neither one nor that of
                the deltas.
        """
        given = [adapter] if isinstance(adapter, str | Path) else list(adapter or ())
        adapters = tuple(Path(path) for path in given)
        count = len(adapters) + (tuned is not None)
        if not count:
            raise RecipeError("there is nothing to merge; give --adapter, or --tuned and --base")
        return cls(adapters=adapters, weights=_spread(weight, count), target=Path(target),
                   out=Path(out), tuned=_path(tuned), base=_path(base), method=method,
                   options=dict(options or {}), layer_weights=layer_weights, sidecar=sidecar,
                   dtype=dtype, rope_from=_path(rope_from), overwrite=overwrite)

    def check(self) -> None:
        """Raise RecipeError for weights that are no finite numbers, or a tuned without base."""
        for weight in self.weights:
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise RecipeError(f"weight is {weight!r}; give a finite number")
        if self.tuned is not None and self.base is None:
            raise RecipeError(f"tuned is {self.tuned} but there is no base to subtract from it; "
                              "give --base, the model that it was tuned from")

    def make_method(self) -> Method:
        """The method with its options.

        Raises:
            RecipeError: no such method or option, or one that needs a base and has none.
        """
        made = make_method(self.method, self.options)
        if made.needs_base and self.base is None:
            raise RecipeError(f"method {self.method} looks at what the target's own tuning "
                              "changed; give --base, the model that the target was tuned from")
        return made

    def inputs(self) -> dict[str, Path]:
        """Role -> path of everything that is read."""
        several = len(self.adapters) > 1
        found = {f"adapter.{number}" if several else "adapter": path
                 for number, path in enumerate(self.adapters)}
        found["target"] = self.target
        if isinstance(self.layer_weights, str | Path):
            found["layer_weights"] = Path(self.layer_weights)
        for role in ("tuned", "base"):
            if getattr(self, role) is not None:
                found[role] = getattr(self, role)
        if self.rope_from is not None:
            found["rope_from"] = self.rope_from / "config.json"
        return found

    def settings(self) -> dict[str, Any]:
        """Everything else that decides the output, as JSON."""
        from_file = isinstance(self.layer_weights, str | Path)
        return {"weight": list(self.weights) if len(self.weights) > 1 else self.weights[0],
                "method": self.method, "options": dict(self.options),
                "layer_weights": None if from_file else self.layer_weights,
                "sidecar": self.sidecar, "dtype": self.dtype}


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def _spread(weight: Weights, count: int) -> tuple[float, ...]:
    if not isinstance(weight, list | tuple):
        return (weight,) * count
    if len(weight) == 1:
        return tuple(weight) * count
    if len(weight) != count:
        raise RecipeError(f"there are {len(weight)} weights for {count} deltas; give one for each "
                          "adapter, in order, then one for tuned - base; or one for all")
    return tuple(weight)
