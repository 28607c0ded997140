"""What a measure needs beyond the protocol of backends."""

from typing import Any

from extend.errors import CompatibilityError
from extend.evaluate.backends.backend import Backend
from extend.evaluate.tasks.task import Cell


def require(backend: Backend, cell: Cell, *names: str) -> Any:
    """The backend, if it has all that a measure needs.

    Raises:
        CompatibilityError: it has not.
    """
    missing = [name for name in names if not hasattr(backend, name)]
    if missing:
        raise CompatibilityError(f"{cell.name}: needs {', '.join(missing)} of a model in this "
                                 f"process, which the backend {backend.name!r} does not give; "
                                 "leave the task out, or evaluate with the local backend")
    return backend
