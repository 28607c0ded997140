"""flash-attn-4's functions with as many results as torch's adapter for them takes.

torch (2.11 to 2.13) unpacks out and lse, and dq, dk and dv; newer releases of the package give
more. torch imports this module when the kernel "fa4" is activated; nothing else does.
"""

from typing import Any

from flash_attn.cute import interface
from torch import Tensor


def _flash_attn_fwd(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse."""
    return interface._flash_attn_fwd(*args, **options)[:2]


def _flash_attn_bwd(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    return interface._flash_attn_bwd(*args, **options)[:3]
