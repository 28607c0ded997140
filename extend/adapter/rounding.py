"""What merging loses on its own: W + B A rounded to 16 bits, against the same sum unrounded."""

from collections.abc import Iterator

import torch

from extend.checkpoint import Checkpoint, torch_dtype
from extend.delta.lowrank import Product
from extend.errors import CheckpointError

_BLOCKS, _BLOCK_ROWS = 16, 16  # rows that are looked at; any two of them 1/16 of the matrix apart


def merge_loss(base: Checkpoint, name: str, product: Product, norm: float,
               dtype: str) -> float | None:
    """||round(W + B A) - (W + B A)||_F / ||B A||_F, where W is the base's weight in `dtype`.

    A fine-tune of the base loses the same, because it rounds at the same places of its scale. Of a
    matrix of more than 256 rows, that many in 16 blocks evenly apart stand for all, so that little
    of the base is read again.

    Args:
        name: of the weight in the base.
        product: B A [out, in].
        norm: ||B A||_F.
        dtype: safetensors name of the dtype that the merged weight is stored in.

    Returns:
        The relative error; None where B A is zero.
    """
    if norm == 0:
        return None
    stored = torch_dtype(dtype)
    total_rows, seen, squares = base.infos[name].shape[0], 0, 0.0
    for rows, read in _read_sample(base, name):
        weight = read.to(stored).float()
        wanted = weight + product.lora_b[rows].float() @ product.lora_a.float()
        squares += float((wanted.to(stored).float() - wanted).double().square().sum())
        seen += weight.shape[0]
    return (squares * total_rows / seen) ** 0.5 / norm


def merge_dtype(base: Checkpoint, name: str) -> str:
    """What a merged weight is stored in: the base's own 16 bits, or bfloat16."""
    own = base.infos[name].dtype
    return own if own in ("BF16", "F16") else "BF16"


def _read_sample(base: Checkpoint, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their values), with no more of the file read than these."""
    from safetensors import SafetensorError, safe_open

    path = base.directory / base.file_of[name]
    try:
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)
            for rows in _sample(base.infos[name].shape[0]):
                yield rows, part[rows]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} cannot be read ({error})") from None


def _sample(rows: int) -> Iterator[slice]:
    if rows <= _BLOCKS * _BLOCK_ROWS:
        yield slice(0, rows)
        return
    for block in range(_BLOCKS):
        start = block * (rows - _BLOCK_ROWS) // (_BLOCKS - 1)
        yield slice(start, start + _BLOCK_ROWS)
