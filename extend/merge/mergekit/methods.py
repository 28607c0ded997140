"""mergekit's merge methods, by the names `mergekit:ties`, `mergekit:slerp` and so on.

Names, options and what a method needs are read from the registry of the mergekit that is installed,
so that what it gains needs no change here. Nothing is merged in this file.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from extend.errors import CompatibilityError, RecipeError
from extend.registry import lookup, suggest

PREFIX = "mergekit:"
BASE, TARGET = "base", "target"
SEED = "seed"
_OLDEST = "0.1.5"


@dataclass(frozen=True)
class MergekitMethod:
    """One method of mergekit.

    Attributes:
        name: mergekit's own, such as `ties`.
        shared: options with one value for the whole merge -> mergekit's definition.
        per_model: options with a value for each model -> mergekit's definition.
        pairwise: whether it blends exactly two models, here the target and one long model, where
            mergekit's `base_model` is the target.
        base: required, optional or forbidden; of methods that are not pairwise.
    """

    name: str
    shared: Mapping[str, Any]
    per_model: Mapping[str, Any]
    pairwise: bool
    base: str
    registered: Any = field(repr=False)

    @property
    def weighted(self) -> bool:
        """Whether each model has a weight, so that the merge's own weight means something."""
        return "weight" in self.per_model


@dataclass(frozen=True)
class Settings:
    """The options of a merge as mergekit's configuration takes them.

    Attributes:
        shared: option -> value.
        per_model: role of a model -> option -> value.
        seed: of the methods that drop elements at random.
    """

    shared: dict[str, Any]
    per_model: dict[str, dict[str, Any]]
    seed: int


def is_mergekits(method: str) -> bool:
    """Whether a method's name is one that mergekit runs."""
    return method.startswith(PREFIX)


def load_method(method: str) -> MergekitMethod:
    """The method `mergekit:NAME` of the installed mergekit.

    Raises:
        CompatibilityError: mergekit is missing or too old.
        RecipeError: it has no such method.
    """
    return lookup(load_methods(), method, "method")


def load_methods() -> dict[str, MergekitMethod]:
    """All methods of the installed mergekit that merge models, by the names used here.

    Raises:
        CompatibilityError: mergekit is missing or too old.
    """
    try:
        from mergekit.merge_methods import registered_methods
    except ImportError as error:
        raise CompatibilityError(
            f"methods named {PREFIX}... are run by mergekit {_OLDEST} or newer, which cannot be "
            f"imported ({error}); install it with: pip install 'mergekit>={_OLDEST}'") from error
    found = {}
    for registered in registered_methods():
        contract = registered.spec.contract
        if contract.max_inputs != 1:  # passthrough copies a single model
            name = registered.spec.name
            found[PREFIX + name] = MergekitMethod(
                name=name, registered=registered, pairwise=contract.max_inputs == 2,
                shared={p.name: p for p in registered.spec.shared_parameters},
                per_model={p.name: p for p in registered.spec.input_parameters},
                base={"ignored": "forbidden"}.get(contract.base.value, contract.base.value))
    return found


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Check a method's name and the names and values of its options, as a recipe gives them.

    Raises:
        CompatibilityError: mergekit is missing or too old.
        RecipeError: an unknown method or option, or a value that it does not take.
    """
    longs = sorted({role for role, _ in map(_split, options) if role and role != TARGET})
    read_settings(load_method(method), options, longs or ["long"], [1.0] * max(1, len(longs)))


def long_roles(count: int) -> list[str]:
    """What the long models are called in options: `long`, or `long1`, `long2` where several."""
    return ["long"] if count == 1 else [f"long{number}" for number in range(1, count + 1)]


def read_settings(method: MergekitMethod, options: Mapping[str, Any], longs: Sequence[str],
                  weights: Sequence[float]) -> Settings:
    """Check options and give each model its own.

    Args:
        options: `NAME` for a shared option, or for one of all models; `target.NAME`, `long.NAME`
            for one model alone; `seed`. A value is a number, boolean or text, a list that mergekit
            interpolates over the layers, or its list of mappings with `filter` and `value`.
        longs: roles of the long models.
        weights: one for each of them, the merge's own.

    Raises:
        RecipeError: an unknown option or role, a value that mergekit does not take, a required
            option that is missing, or a weight of a method without weights.
    """
    _check_weights(method, options, longs, weights)
    shared: dict[str, Any] = {}
    general: dict[str, Any] = {}
    per_model: dict[str, dict[str, Any]] = {role: {} for role in (TARGET, *longs)}
    if method.weighted:
        for role, weight in zip((TARGET, *longs), (1.0, *weights), strict=True):
            per_model[role]["weight"] = weight
    for key, value in options.items():
        role, name = _split(key)
        if key == SEED:
            continue
        definition = _definition(method, role, name, longs)
        _check_value(method, key, definition, value)
        (per_model[role] if role else shared if name in method.shared else general)[name] = value
    missing = [name for name, p in method.shared.items() if p.required and name not in shared]
    if missing:
        raise RecipeError(f"{PREFIX}{method.name}: missing option {', '.join(missing)}")
    settings = Settings(shared, {role: {**general, **own} for role, own in per_model.items()},
                        _seed(options.get(SEED, 0)))
    _check_della(method, settings)
    return settings


def _split(key: str) -> tuple[str, str]:
    """`long.density` -> (`long`, `density`); `density` -> (``, `density`)."""
    role, _, name = key.rpartition(".")
    return role, name


def _definition(method: MergekitMethod, role: str, name: str, longs: Sequence[str]) -> Any:
    where = f"{PREFIX}{method.name}"
    known = dict(method.per_model) if role else {**method.shared, **method.per_model}
    if role and role not in (TARGET, *longs):
        raise RecipeError(f"{where}: option {role}.{name} names no model of this merge; they are "
                          f"{', '.join((TARGET, *longs))}")
    if name not in known:
        accepted = ", ".join((*known, *(() if role else (SEED,)))) or "no options"
        of_one = f" of one model ({role})" if role else ""
        raise RecipeError(f"{where}: unknown option {name!r}{of_one};{suggest(name, known)} it "
                          f"accepts {accepted}")
    return known[name]


def _check_weights(method: MergekitMethod, options: Mapping[str, Any], longs: Sequence[str],
                   weights: Sequence[float]) -> None:
    where = f"{PREFIX}{method.name}"
    if not method.weighted:
        if any(weight != 1 for weight in weights):
            known = ", ".join((*method.shared, *method.per_model)) or "no options"
            raise RecipeError(f"{where} has no weights, but weight is "
                              f"{', '.join(f'{w:g}' for w in weights)}; leave it out; the method "
                              f"accepts {known}")
        return
    if "weight" in options:
        raise RecipeError(f"{where}: option weight would be that of every model; give --weight "
                          "for the long ones and option target.weight for the target")
    for role, weight in zip(longs, weights, strict=True):
        if f"{role}.weight" in options and weight != 1:
            raise RecipeError(f"{where}: the weight of {role} is {weight:g} by --weight but "
                              f"{options[f'{role}.weight']} by option {role}.weight; give one")


def _check_value(method: MergekitMethod, key: str, definition: Any, value: Any) -> None:
    """Refuse what mergekit would refuse later, or take for something else without a word."""
    where = f"{PREFIX}{method.name}: option {key}"
    for scalar in _scalars(value, where):
        try:
            number = definition.validate(scalar)
        except ValueError as error:
            reason = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
            raise RecipeError(f"{where} is {scalar!r}; {reason}") from None
        if isinstance(number, float) and not math.isfinite(number):
            raise RecipeError(f"{where} is {scalar!r}; give a finite number")
        if definition.name == "density" and not 0 < number <= 1:
            raise RecipeError(f"{where} is {scalar!r}; it is the fraction to keep, above 0 and at "
                              "most 1")


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


def _check_della(method: MergekitMethod, settings: Settings) -> None:
    """DELLA draws with probabilities in density +- epsilon; mergekit fails half-way otherwise."""
    if not method.name.startswith("della"):
        return
    for role, own in settings.per_model.items():
        density = own.get("density", method.per_model["density"].default)
        epsilon = own.get("epsilon", method.per_model["epsilon"].default)
        both = isinstance(density, int | float) and isinstance(epsilon, int | float)
        if both and density < 1 and not epsilon < density < 1 - epsilon:
            raise RecipeError(f"{PREFIX}{method.name}: for {role} density is {density:g} and "
                              f"epsilon {epsilon:g}; density - epsilon must be above 0 and "
                              "density + epsilon below 1")


def _seed(value: Any) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not float(value).is_integer() or not 0 <= value < 2**32:
        raise RecipeError(f"option {SEED} is {value!r}; give a whole number from 0 to 2^32 - 1")
    return int(value)
