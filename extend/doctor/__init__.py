"""The doctor: would every engine compute the same from this checkpoint, at the same length?

Importing this package imports no torch; asking it for `doctor` does.
"""

from typing import TYPE_CHECKING, Any

from extend.doctor.diagnosis import Diagnosis

if TYPE_CHECKING:
    from extend.doctor.visit import doctor

__all__ = ["Diagnosis", "doctor"]


def __getattr__(name: str) -> Any:
    if name == "doctor":
        from extend.doctor.visit import doctor

        return doctor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
