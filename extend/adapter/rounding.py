"""What merging loses on its own: W + B A rounded to 16 bits, against the same sum unrounded."""

import torch

from extend.checkpoint import Checkpoint, torch_dtype
from extend.delta.lowrank import Product

_BLOCKS, _BLOCK_ROWS = 16, 8  # rows that are looked at


def merge_loss(base: Checkpoint, name: str, product: Product, norm: float,
               dtype: str) -> float | None:
    """||round(W + B A) - (W + B A)||_F / ||B A||_F, where W is the base's weight in `dtype`.

    A fine-tune of the base loses the same, because it rounds at the same places of its scale. Of a
    matrix of more than 128 rows, that many in 16 blocks evenly apart stand for all, so that little
    of the base is read again.

    Args:
        name: of the weight in the base.
        product: B A [out, in], fp32.
        norm: ||B A||_F.
        dtype: safetensors name of the dtype that the merged weight is stored in.

    Returns:
        The relative error; None where B A is zero.
    """
    if norm == 0:
        return None
    stored, total_rows = torch_dtype(dtype), base.infos[name].shape[0]
    blocks = _sample(total_rows)
    whole = base.stored(name)
    weight = torch.cat([whole[rows] for rows in blocks]).to(stored).float()
    wanted = weight + torch.cat([product.lora_b[rows] for rows in blocks]) @ product.lora_a
    squares = float((wanted.to(stored).float() - wanted).square().sum(dtype=torch.float64))
    return (squares * total_rows / weight.shape[0]) ** 0.5 / norm


def merge_dtype(base: Checkpoint, name: str) -> str:
    """What a merged weight is stored in: the base's own 16 bits, or bfloat16."""
    own = base.infos[name].dtype
    return own if own in ("BF16", "F16") else "BF16"


def _sample(rows: int) -> list[slice]:
    if rows <= _BLOCKS * _BLOCK_ROWS:
        return [slice(0, rows)]
    starts = (block * (rows - _BLOCK_ROWS) // (_BLOCKS - 1) for block in range(_BLOCKS))
    return [slice(start, start + _BLOCK_ROWS) for start in starts]
