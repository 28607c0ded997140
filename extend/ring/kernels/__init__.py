"""Attention of one tile: the kernels that the ring runs at every step.

A kernel computes a tile, query rows x key rows with a mask; it says which masks it takes and why it
does not take given tensors, so that "auto", the planner and an error message rest on the same
answer.
"""

from extend.ring.kernels.base import Kernel
from extend.ring.kernels.choose import KERNELS, choose_kernel

__all__ = ["KERNELS", "Kernel", "choose_kernel"]
