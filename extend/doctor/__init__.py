"""The doctor: would every engine compute the same from this checkpoint, at the same length?

Importing this package imports no torch; calling it does.
"""

from extend.doctor.diagnosis import Diagnosis
from extend.doctor.visit import doctor

__all__ = ["Diagnosis", "doctor"]
