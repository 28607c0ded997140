"""mergekit's methods: TIES, DARE, DELLA, SLERP and the rest, under names such as `mergekit:ties`.

Only the arithmetic is mergekit's. Its command takes config and tokenizer from the base model, so
that a merge with a long model comes out with the short model's RoPE; it pairs embedding rows by
their number, and writes what its own definition of an architecture lists. Here each tensor is read,
mapped and written as by any other method of a merge, so RoPE, tokenizer, vocabulary, shards and
checks are the same, adapters need no merged checkpoint of their own, and no architecture is unknown
to it. Names, options and what a method needs are read from the registry of the installed mergekit.

Source: arcee-ai/mergekit 0.1.5, mergekit/merge_methods/api.py `merge_tensors`;
mergekit/merge.py `_model_out_config`.
"""

import contextlib
import hashlib
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from extend.delta.pair import layer_of
from extend.errors import CheckpointError, RecipeError
from extend.merge.methods import MERGEKIT_PREFIX, Method
from extend.registry import lookup, suggest

if TYPE_CHECKING:
    import torch

_BASE, _TARGET, _SEED = "base", "target", "seed"
_OLDEST = "0.1.5"
_LONG = re.compile(r"long\d*")


def load_methods() -> dict[str, Any]:
    """mergekit's own objects by the names used here: all methods that merge several models.

    Raises:
        RecipeError: mergekit is missing or too old.
    """
    try:
        from mergekit.merge_methods import merge_tensors, registered_methods  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"methods named {MERGEKIT_PREFIX}... are those of mergekit {_OLDEST} or newer, which "
            f"cannot be imported ({error}); install it with: pip install "
            f"'mergekit>={_OLDEST}'") from error
    return {MERGEKIT_PREFIX + found.spec.name: found for found in registered_methods()
            if found.spec.contract.max_inputs != 1}  # passthrough copies a single model


class Mergekit(Method):
    """One of mergekit's methods, on the target, its base, and base + each delta.

    Methods over a base (task_arithmetic, ties, dare_ties, della, breadcrumbs, sce, model_stock,
    ...) combine what the target and the long models changed in the base. Those that blend exactly
    two models (slerp, nearswap, arcee_fusion) go from the target to the long model, and linear and
    karcher blend all models, so that each keeps only a part of what it learned.

    An option is `NAME` for the whole merge or for each model, or `target.NAME`, `long.NAME` (with
    several long models `long1.NAME`, `long2.NAME`, in the order of the weights) for one of them.
    Its value is a number, boolean or text; a list that is interpolated over the layers, from the
    first layer to the last; or a list of mappings with `filter` (a part of a tensor's name) and
    `value`, of which the first that fits counts. The weight of a long model is that of the merge;
    the target's is 1 unless `target.weight` says otherwise.

    Each tensor of a method that drops elements at random gets a generator of its own, made from
    option `seed` and the tensor's name: the same seed on the same kind of device gives the same
    bytes.

    Args:
        name: such as `mergekit:ties`.
        options: as above.

    Raises:
        RecipeError: no such method or option, a value that mergekit does not take, or no mergekit.
    """

    needs_base = True
    by_rows = False

    def __init__(self, name: str, options: Mapping[str, Any]):
        self.name = name
        self._registered = lookup(load_methods(), name, "method")
        spec = self._registered.spec
        self._shared = {p.name: p for p in spec.shared_parameters}
        self._per_model = {p.name: p for p in spec.input_parameters}
        self.seed = _check_seed(options.get(_SEED, 0))
        self._settings = {key: self._check_option(key, value) for key, value in options.items()
                          if key != _SEED}
        missing = [key for key, p in self._shared.items()
                   if p.required and key not in self._settings]
        if missing:
            raise RecipeError(f"{name}: missing option {', '.join(missing)}")
        self._roles = [_TARGET, "long"]
        self._weights = [1.0]
        self._random = threading.Lock()

    @property
    def base_role(self) -> str | None:
        """The model that mergekit calls the base, None for methods that have none."""
        contract = self._registered.spec.contract
        if contract.max_inputs == 2:
            return _TARGET
        return None if contract.base.value in ("ignored", "forbidden") else _BASE

    @property
    def weighted(self) -> bool:
        """Whether models have weights, so that those of the merge mean something."""
        return "weight" in self._per_model

    def settle(self, weights: Sequence[float], *, layered: bool) -> None:
        """See `Method.settle`."""
        self._weights = list(weights)
        longs = ["long"] if len(weights) == 1 else [f"long{i + 1}" for i in range(len(weights))]
        self._roles = [_TARGET, *longs]
        ids = [*self._roles, *([_BASE] if self.base_role == _BASE else [])]
        try:
            self._registered.validate_inputs(ids, self.base_role)
        except ValueError as error:
            raise RecipeError(f"{self.name} of {', '.join(ids)}: {error}") from None
        for key in self._settings:
            role = key.rpartition(".")[0]
            if role and role not in self._roles:
                raise RecipeError(f"{self.name}: option {key} names no model of this merge; they "
                                  f"are {', '.join(self._roles)}")
        self._check_weights(longs, layered)
        self._check_della()

    def merge(self, name: str, target: "torch.Tensor", base: "torch.Tensor",
              longs: Sequence["torch.Tensor"], *, num_layers: int,
              factor: float = 1.0) -> "torch.Tensor":
        """The merged values of one parameter.

        Args:
            target: fp32, on the device to compute on; so are the others, of equal shape.
            longs: one for each weight that `settle` was given.
            num_layers: of the model, for options that change over the layers.
            factor: of the long models' weights, see `LayerWeights`.

        Raises:
            CheckpointError: mergekit fails on this tensor.
            RecipeError: no entry of a required option fits it.
        """
        from mergekit.merge_methods import merge_tensors

        tensors = dict(zip(self._roles, (target, *longs), strict=True))
        if self.base_role == _BASE:
            tensors[_BASE] = base
        ids = list(tensors)
        parameters = self._parameters(name, _place(name, num_layers), factor)
        try:
            with self._random, _seeded(f"{self.seed}:{name}", target.device):
                return merge_tensors(
                    list(tensors.values()), self._registered, parameters=parameters, ids=ids,
                    base_index=ids.index(self.base_role) if self.base_role else None, name=name)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"tensor {name}: {self.name} of mergekit failed ({error}); "
                                  "choose other options or another method") from error

    def _parameters(self, name: str, place: float, factor: float) -> dict[str, Any]:
        """mergekit's parameters of one tensor: shared ones, and role -> value of the others."""
        found: dict[str, Any] = {
            key: _value(p, [self._settings.get(key)], name, place)
            for key, p in self._shared.items()}
        for key, p in self._per_model.items():
            found[key] = {role: _value(p, [self._settings.get(f"{role}.{key}"),
                                           self._settings.get(key)], name, place)
                          for role in self._roles
                          if key != "weight" or f"{role}.{key}" in self._settings}
        if self.weighted:
            given = dict(zip(self._roles, (1.0, *self._weights), strict=True))
            weights = {**given, **found["weight"]}
            found["weight"] = {role: weight * (1.0 if role == _TARGET else factor)
                               for role, weight in weights.items()}
        return found

    def _check_option(self, key: str, value: Any) -> Any:
        """The setting as mergekit's own type; see `__init__` for what is refused."""
        role, _, name = key.rpartition(".")
        known = self._per_model if role else {**self._shared, **self._per_model}
        if role and role != _TARGET and not _LONG.fullmatch(role):
            raise RecipeError(f"{self.name}: option {key} names no model; write target.{name}, "
                              f"long.{name}, or long1.{name} where there are several")
        if name not in known:
            accepted = ", ".join((*known, *(() if role else (_SEED,)))) or "no options"
            of_one = f" of one model ({role})" if role else ""
            raise RecipeError(f"{self.name}: unknown option {name!r}{of_one};"
                              f"{suggest(name, known)} it accepts {accepted}")
        if key == "weight":
            raise RecipeError(f"{self.name}: option weight would be that of every model; give "
                              "--weight for the long ones and option target.weight for the target")
        where = f"{self.name}: option {key}"
        for scalar in _scalars(value, where):
            _check_scalar(known[name], scalar, where)
        return _typed(value)

    def _check_weights(self, longs: Sequence[str], layered: bool) -> None:
        if not self.weighted and (layered or any(weight != 1 for weight in self._weights)):
            known = ", ".join((*self._shared, *self._per_model)) or "no options"
            shown = "layer_weights are given" if layered else \
                f"weight is {', '.join(f'{w:g}' for w in self._weights)}"
            raise RecipeError(f"{self.name} has no weights, but {shown}; leave them out; the "
                              f"method accepts {known}")
        for role, weight in zip(longs, self._weights, strict=True):
            if f"{role}.weight" in self._settings and weight != 1:
                raise RecipeError(f"{self.name}: the weight of {role} is {weight:g} by --weight "
                                  f"but {self._settings[f'{role}.weight']} by option "
                                  f"{role}.weight; give one")

    def _check_della(self) -> None:
        """DELLA keeps elements with probabilities from density - epsilon to density + epsilon."""
        if not {"density", "epsilon"} <= set(self._per_model):
            return
        for role in self._roles:
            density, epsilon = (self._settings.get(f"{role}.{key}", self._settings.get(
                key, self._per_model[key].default)) for key in ("density", "epsilon"))
            numbers = isinstance(density, int | float) and isinstance(epsilon, int | float)
            if numbers and density < 1 and not epsilon < density < 1 - epsilon:
                raise RecipeError(f"{self.name}: for {role} density is {density:g} and epsilon "
                                  f"{epsilon:g}; density - epsilon must be above 0 and density + "
                                  "epsilon below 1")


def _check_scalar(definition: Any, scalar: Any, where: str) -> None:
    """Refuse what mergekit refuses later, or takes for something else without a word."""
    try:
        value = definition.validate(scalar)
    except ValueError as error:
        reason = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
        raise RecipeError(f"{where} is {scalar!r}; {reason}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where} is {scalar!r}; give a finite number")
    if definition.name == "density" and not 0 < value <= 1:
        raise RecipeError(f"{where} is {scalar!r}; it is the fraction to keep, above 0 and at most "
                          "1")


def _scalars(setting: Any, where: str) -> Iterator[Any]:
    """Every value in a setting: itself, of a list over the layers, or of filtered entries."""
    if isinstance(setting, Mapping):
        if not {"value"} <= set(setting) <= {"value", "filter"}:
            raise RecipeError(f"{where} holds a mapping with {', '.join(map(str, setting))}; an "
                              "entry for some tensors has filter and value")
        yield from _scalars(setting["value"], where)
    elif isinstance(setting, list):
        if not setting:
            raise RecipeError(f"{where} is an empty list; give a value for each part of the layers")
        for item in setting:
            yield from _scalars(item, where)
    else:
        yield setting


def _typed(setting: Any) -> Any:
    """A list or mapping as the types that mergekit evaluates; a scalar as it is."""
    if not isinstance(setting, list | Mapping):
        return setting
    from mergekit.config import ParameterSetting
    from pydantic import TypeAdapter

    return TypeAdapter(ParameterSetting).validate_python(setting)


def _value(definition: Any, settings: Sequence[Any], name: str, place: float) -> Any:
    """The value of an option for one tensor: of the first setting that has one, or the default."""
    for setting in settings:
        if isinstance(setting, bool | int | float | str):
            return definition.validate(setting)
        if setting is not None:
            from mergekit.config import evaluate_setting

            value = evaluate_setting(name, setting, place, validate=definition.validate)
            if value is not None:
                return value
    if definition.required:
        raise RecipeError(f"tensor {name}: no entry of option {definition.name} fits it; add one "
                          "without a filter")
    return definition.default


def _place(name: str, num_layers: int) -> float:
    """Where in the layers a tensor lies: 0 at the first, 1 at the last; 0 outside the layers.

    Source: mergekit/plan.py `MergePlanner.plan_slice` and `plan_module`.
    """
    layer = layer_of(name)
    if layer is None:
        return 0.0
    return layer / (num_layers - 1) if num_layers > 1 else 1.0


def _check_seed(value: Any) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not float(value).is_integer() or not 0 <= value < 2**32:
        raise RecipeError(f"option {_SEED} is {value!r}; give a whole number from 0 to 2^32 - 1")
    return int(value)


@contextlib.contextmanager
def _seeded(text: str, device: "torch.device") -> Iterator[None]:
    """Seed torch's generators inside a block, and leave them outside of it as they were."""
    import torch

    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield
