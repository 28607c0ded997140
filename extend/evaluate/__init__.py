"""Evaluate a model by length and depth, and show several models side by side.

Imports no torch: that waits until a stage runs.
"""

from extend.evaluate.evaluate import evaluate
from extend.evaluate.plan import check_tasks
from extend.evaluate.report import report

__all__ = ["check_tasks", "evaluate", "report"]
