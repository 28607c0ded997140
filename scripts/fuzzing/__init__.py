"""Fuzzing of every parser of files and names from outside; see `scripts/fuzz.py`."""
