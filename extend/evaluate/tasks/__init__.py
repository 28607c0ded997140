"""The evaluation tasks. To add one: a class like those here, a line in TASKS, a test."""

from extend.evaluate.tasks.exact_match import ExactMatch
from extend.evaluate.tasks.loss import Loss
from extend.evaluate.tasks.passkey import Passkey, PasskeyText
from extend.evaluate.tasks.task import Cell, Prompt, Task

__all__ = ["GROUPS", "TASKS", "Cell", "Prompt", "Task"]

# Names that stand for several tasks.
GROUPS: dict[str, tuple[str, ...]] = {}

TASKS: dict[str, type[Task]] = {
    "passkey": Passkey, "passkey-text": PasskeyText, "exact-match": ExactMatch, "loss": Loss}
