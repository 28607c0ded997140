"""From what a user wrote for an input to a path that stages read."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from extend.inputs.names import HubInput, as_hub_input
from extend.inputs.pin import pin

_Stage = TypeVar("_Stage", bound=Callable[..., Any])


def local_path(value: Path | str, *, only: str | None = None, weights: bool = True) -> Path:
    """The path of an input; one of the Hub is fetched first.

    Args:
        value: a path, `ORG/NAME`, `ORG/NAME@REVISION`, or with `:FILE` one file of it.
        only: name of the one file that is needed of a repository.
        weights: False: only what lies beside them is needed.

    Raises:
        HubError: no such repository, revision or file, no access to it, or no Hub.
        CheckpointError: a repository without safetensors weights.
    """
    wanted = as_hub_input(value)
    if wanted is None:
        return Path(value)
    return pin(HubInput(wanted.id, wanted.file or only), weights=weights).fetch()


def takes_models(*names: str) -> Callable[[_Stage], _Stage]:
    """Let arguments of a stage name repositories of the Hub: the stage gets paths.

    Args:
        names: of arguments that are a path, several, or None.
    """
    def decorate(stage: _Stage) -> _Stage:
        signature = inspect.signature(stage)
        rest = next((name for name, parameter in signature.parameters.items()
                     if parameter.kind is parameter.VAR_KEYWORD), "")

        @functools.wraps(stage)
        def resolved(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            for given in (bound.arguments, bound.arguments.get(rest, {})):
                for name in given.keys() & set(names):
                    given[name] = _resolve(given[name])
            return stage(*bound.args, **bound.kwargs)

        return resolved  # type: ignore[return-value]
    return decorate


def _resolve(value: Any) -> Any:
    if isinstance(value, str | Path):
        return value if as_hub_input(value) is None else local_path(value)
    if isinstance(value, list | tuple):
        return type(value)(_resolve(item) for item in value)
    return value
