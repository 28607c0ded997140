"""RoPE for longer contexts: the methods, their frequencies, and the `rescale` stage.

Importing this package does not import torch; `extend.rope.frequencies` does so when called.
"""

from extend.rope.methods import METHODS
from extend.rope.rescale import rescale

__all__ = ["METHODS", "rescale"]
