"""Give a language model a long context, and hand it on to every fine-tune of the same base.

One function per stage; each returns the path of what it wrote. They are imported on first use,
so that `import extend` and `extend --help` do not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from extend.errors import (
    CheckpointError,
    CompatibilityError,
    DataError,
    ExtendError,
    LayoutError,
    RecipeError,
    TrainingError,
)

__version__ = "0.1.0"

_STAGES = {"plan": "extend.plan", "plan_recipe": "extend.recipe_plan",
           "search": "extend.search", "rescale": "extend.rope",
           "train": "extend.train", "extract": "extend.adapter", "cut": "extend.adapter",
           "adapter_report": "extend.adapter", "merge": "extend.merge",
           "fit": "extend.transfer", "repair": "extend.transfer", "lineage": "extend.lineage",
           "evaluate": "extend.evaluate", "report": "extend.evaluate",
           "doctor": "extend.doctor", "run": "extend.run"}

__all__ = ["CheckpointError", "CompatibilityError", "DataError", "ExtendError", "LayoutError",
           "RecipeError", "TrainingError", "__version__", *_STAGES]


class _Package(ModuleType):
    """`extend.merge` is the function, although a package of that name is imported too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _STAGES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _STAGES:
            raise AttributeError(f"module 'extend' has no attribute {name!r}")
        return getattr(import_module(_STAGES[name]), name)


sys.modules[__name__].__class__ = _Package
