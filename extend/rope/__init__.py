"""RoPE for longer contexts: the methods, their frequencies, and the `rescale` stage.

Importing this package does not import torch; `extend.rope.frequencies` does so when called. The
stage, which reads and writes checkpoints, is imported when it is asked for: help names the methods.
"""

from typing import TYPE_CHECKING, Any

from extend.rope.methods import METHODS

if TYPE_CHECKING:
    from extend.rope.rescaling import rescale

__all__ = ["METHODS", "rescale"]


def __getattr__(name: str) -> Any:
    if name == "rescale":
        from extend.rope.rescaling import rescale

        return rescale
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
