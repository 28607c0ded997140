"""How much of a delta each parameter gets."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from extend.delta.pair import layer_of
from extend.errors import RecipeError
from extend.model_config import read_json

_DEFAULT = "default"
_SCHEMA = 1
_IN_DIRECTORY = "weights.json"


class LayerWeights:
    """Factors of parameters, beside those of whole deltas.

    Args:
        value: None for 1 everywhere; a number; a list of numbers, laid over the layers at equal
            distances and interpolated between them; a mapping from the names of parameters or
            modules, or regular expressions that are looked for in names, to numbers (its key
            `default` is for what no other fits, else 1); or the path of a JSON file
            {"schema": 1, "weights": such a mapping, "default": 1.0}, or of a directory with such
            a `weights.json`, as `fit` writes. A name goes before an expression.

    Raises:
        RecipeError: anything else, or a number that is not finite.
        CheckpointError: a file that cannot be read.
    """

    def __init__(self, value: float | Sequence[float] | Mapping[str, float] | str | Path | None):
        self.file = Path(value) if isinstance(value, str | Path) else None
        if self.file is not None:
            value = _read_file(self.file / _IN_DIRECTORY if self.file.is_dir() else self.file)
        self._by_name = {} if not isinstance(value, Mapping) else {
            key: _number(number, key) for key, number in value.items() if key != _DEFAULT}
        self._patterns = {key: _compile(key) for key in self._by_name}
        if isinstance(value, Mapping):
            self._points = [_number(value.get(_DEFAULT, 1.0), _DEFAULT)]
        else:
            points = value if isinstance(value, list | tuple) else [1.0 if value is None else value]
            if not points:
                raise RecipeError("layer_weights is an empty list; give at least one number")
            self._points = [_number(point, "layer_weights") for point in points]

    def weight_of(self, name: str, num_layers: int) -> float:
        """The factor of one parameter.

        Of a list, what comes before the layers (the embedding) gets the first number, and what
        comes after them the last.

        Raises:
            RecipeError: two expressions with different numbers fit.
        """
        for key in (name, name.rpartition(".")[0]):
            if key in self._by_name:
                return self._by_name[key]
        fitting = {key: self._by_name[key] for key, pattern in self._patterns.items()
                   if pattern.search(name)}
        if len(set(fitting.values())) > 1:
            both = " and ".join(f"{key!r} ({number})" for key, number in list(fitting.items())[:2])
            raise RecipeError(f"layer_weights: {both} both fit {name}; make one of them narrower")
        if fitting:
            return next(iter(fitting.values()))
        return self._interpolate(name, num_layers)

    def _interpolate(self, name: str, num_layers: int) -> float:
        layer = layer_of(name)
        if layer is None:
            return self._points[0 if "embed" in name else -1]
        place = layer / max(1, num_layers - 1) * (len(self._points) - 1)
        left = min(int(place), len(self._points) - 1)
        right = min(left + 1, len(self._points) - 1)
        return self._points[left] + (place - left) * (self._points[right] - self._points[left])

    def check(self, names: Iterable[str]) -> None:
        """Raise RecipeError for keys that fit none of the parameters that a merge changes."""
        names = list(names)
        modules = {name.rpartition(".")[0] for name in names}
        unused = [key for key, pattern in self._patterns.items()
                  if key not in names and key not in modules
                  and not any(pattern.search(name) for name in names)]
        if unused:
            raise RecipeError(f"layer_weights: {', '.join(map(repr, unused[:4]))} fit none of the "
                              f"{len(names)} parameters that the deltas change; names look like "
                              f"{min(names, default='(none)')}")
        for name in names:
            self.weight_of(name, 1)


def _read_file(path: Path) -> dict[str, Any]:
    data = read_json(path)
    weights = data.get("weights")
    if data.get("schema") != _SCHEMA or not isinstance(weights, dict):
        raise RecipeError(f"{path}: not layer weights of schema {_SCHEMA}; write "
                          '{"schema": 1, "weights": {name: number}, "default": 1.0}')
    return {**weights, _DEFAULT: data.get(_DEFAULT, 1.0)}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"layer_weights: {value!r} at {where} is not a finite number")
    return float(value)


def _compile(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except re.error as error:
        raise RecipeError(f"layer_weights: {key!r} is no regular expression ({error})") from None
