"""Tasks of EleutherAI's lm-evaluation-harness, for benchmarks whose data the user has."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from extend.errors import CompatibilityError, RecipeError
from extend.evaluate.frame import Frame
from extend.evaluate.tasks.task import Cell, Count, Prompt

PACKAGE = "lm_eval"


@dataclass(kw_only=True)
class LMEval:
    """Run tasks of lm-evaluation-harness on the model, a row for each.

    The harness builds the prompts and scores them; its metrics and standard errors are in the
    rows. It must be installed, and have the data of its tasks (on disk, or in its cache).

    Args:
        tasks: names of its tasks or groups, separated by commas.
        num_fewshot: examples before each question; by default the task's own number.
        limit: use only the first so many documents of each task.
        include_path: folder of task files (YAML) beside its own ones.
        metric: which one is the row's score; by default the task's first that lies in 0 to 1.
        batch_size: rows in one forward.
    """

    measure: ClassVar[str] = "harness"
    on_grid: ClassVar[bool] = False
    joined: ClassVar[bool] = True  # one loading of the harness and of its tasks
    name: ClassVar[str] = "lm-eval"

    tasks: str
    num_fewshot: Count | None = None
    limit: int | None = None
    include_path: str | None = None
    metric: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.names() or len(set(self.names())) < len(self.names()):
            raise RecipeError(f"lm-eval: tasks: {self.tasks!r} must name tasks of the harness, "
                              "separated by commas, each once")

    def names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def inputs(self) -> dict[str, str]:
        return {} if self.include_path is None else {"include_path": self.include_path}

    def cells(self, name: str, lengths: Sequence[int], depths: Sequence[float],
              trials: int) -> list[Cell]:
        return [Cell(f"{name} {task}", self.name, None, None, self.limit or 0)
                for task in self.names()]

    def prompts(self, frame: Frame, cell: Cell, seed: int) -> list[Prompt]:
        """None: the harness builds them.

        Raises:
            CompatibilityError: it is not installed.
        """
        if importlib.util.find_spec(PACKAGE) is None:
            raise CompatibilityError(f"{cell.name}: needs lm-evaluation-harness; pip install "
                                     "'extend-context[lm-eval]'")
        return []
