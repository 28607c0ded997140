"""Look members of a family up by name, and check their options before anything runs."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from extend.errors import RecipeError

T = TypeVar("T")


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return ` did you mean 'x'?` for the closest of `choices`, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" did you mean {close[0]!r}?" if close else ""


def lookup(registry: Mapping[str, T], name: str, field: str) -> T:
    """Return `registry[name]`.

    Raises:
        RecipeError: no such member; the message names `field` and the accepted names.
    """
    if name not in registry:
        choices = ", ".join(registry)
        raise RecipeError(f"{field}: unknown {name!r};{suggest(name, registry)} choose one of "
                          f"{choices}")
    return registry[name]


def option_names(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of `fn`: the options that a recipe may set."""
    parameters = inspect.signature(fn).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(fn: Callable[..., Any], options: Mapping[str, Any], field: str) -> None:
    """Check that `options` name keyword-only parameters of `fn` and leave no required one out.

    Raises:
        RecipeError: an unknown option, or a required one that is missing.
    """
    accepted = option_names(fn)
    for name in options:
        if name not in accepted:
            known = ", ".join(accepted) or "no options"
            hint = suggest(name, accepted)
            raise RecipeError(f"{field}: unknown option {name!r};{hint} it accepts {known}")
    required = [n for n, p in accepted.items() if p.default is inspect.Parameter.empty]
    missing = [n for n in required if n not in options]
    if missing:
        raise RecipeError(f"{field}: missing option {', '.join(missing)}")
