"""How far an adapter's factors are from the best of their rank."""

from pathlib import Path
from typing import Any

import torch

from extend.adapter_format.peft_files import Adapter
from extend.checkpoint import Checkpoint


def excess_residual(base: Path, tuned: Path, adapter: Path, *, every: int,
                    device: str) -> dict[str, Any] | None:
    """`||D - BA|| / (the least error of that rank) - 1` of every so-many-th module.

    The least error comes from all singular values, through the Gram matrix in fp64. Modules of full
    rank, where that error is zero, are left out of the count.
    """
    lora, before, after = Adapter(adapter), Checkpoint(base), Checkpoint(tuned)
    excess = []
    for name in sorted(lora.modules)[::every]:
        whole = f"{name}.weight"
        delta = (after.read(whole).to(device).double() - before.read(whole).to(device).double())
        lora_a, lora_b = (x.to(device).double() for x in lora.read_factors(name))
        if lora_a.shape[0] >= min(delta.shape):
            continue
        wide = delta if delta.shape[0] <= delta.shape[1] else delta.T
        squares = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0)
        least = float(squares[lora_a.shape[0]:].sum()) ** 0.5
        excess.append(float((delta - lora_b @ lora_a).norm()) / least - 1)
    if not excess:
        return None
    return {"modules": len(excess), "mean_excess": sum(excess) / len(excess),
            "max_excess": max(excess)}
