"""tuned - base, one parameter at a time, in fp32."""

import math
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from extend.adapter_format.sidecar import (
    EMBEDDING_SUFFIX,
    HEAD_NAME,
    ModelIdentity,
    parameter_infos,
)
from extend.checkpoint import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, StoredTensor, TensorInfo
from extend.delta.noise import Noise, UlpSums
from extend.delta.svd import frobenius_squared
from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import ModelConfig, read_config

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERTS = re.compile(r"\.experts\b")
_ROUTER_SUFFIXES = (".gate.weight", ".router.weight")
_CACHED_ELEMENTS = 2**18  # of a block that a CPU works on while it is in its caches
_THREAD = threading.local()
_BLOCK_BYTES = 2**26  # of fp32, where a parameter is taken in blocks of rows
_LEAST_LEFT = 0.03  # of ||delta||_F^2, of which fp32 products leave an error of about 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPair:
    """Two checkpoints of one architecture, parameter for parameter of equal shape."""

    base_config: ModelConfig
    tuned_config: ModelConfig
    base: Checkpoint
    tuned: Checkpoint
    infos: dict[str, TensorInfo]
    identity: ModelIdentity


def open_pair(base: Path | str, tuned: Path | str) -> ModelPair:
    """Open both checkpoints and check that each parameter has its partner.

    Raises:
        CheckpointError: a file is missing or damaged.
        CompatibilityError: the models differ in architecture, names or shapes, or hold a parameter
            that is no floating-point number.
    """
    base_config, tuned_config = read_config(base), read_config(tuned)
    base_files, tuned_files = Checkpoint(base), Checkpoint(tuned)
    infos = parameter_infos(base_config, base_files)
    tuned_infos = parameter_infos(tuned_config, tuned_files)
    identity = ModelIdentity.of(base_config, infos)
    problems = identity.differences(ModelIdentity.of(tuned_config, tuned_infos), "base", "tuned")
    if problems:
        raise CompatibilityError(f"{tuned} is not a fine-tune of {base}: {'; '.join(problems)}")
    for directory, group in ((base, infos), (tuned, tuned_infos)):
        for name, info in group.items():
            if info.dtype not in FLOAT_DTYPES:
                raise CompatibilityError(f"{directory}: tensor {name} is {info.dtype}; only "
                                         f"{', '.join(sorted(FLOAT_DTYPES))} can be subtracted, "
                                         "dequantize the model first")
    return ModelPair(base_config=base_config, tuned_config=tuned_config, base=base_files,
                     tuned=tuned_files, infos=infos, identity=identity)


class Stored(NamedTuple):
    """A matrix of both models as it is stored; of equal shape, in memory or still on disk."""

    base: torch.Tensor | StoredTensor
    tuned: torch.Tensor | StoredTensor


class Difference(NamedTuple):
    """tuned - base of one matrix.

    Attributes:
        delta: [out, in], fp32.
        delta_norm: ||delta||_F.
        base_norm: ||base||_F.
        noise: what rounding to the tuned model's stored dtype put into the delta.
    """

    delta: torch.Tensor
    delta_norm: float
    base_norm: float
    noise: Noise


def open_stored(pair: ModelPair, name: str, expert: int | None = None, *,
                pin: bool = False) -> Stored:
    """A parameter of both models, or one expert's matrix [rows, columns] of it.

    Args:
        pin: read it into pinned memory, from which a GPU copies faster and while others work;
            otherwise the system is told that it will be read.
    """
    both = [files.stored(name) for files in (pair.base, pair.tuned)]
    if expert is not None:
        both = [stored.part(expert) for stored in both]
    if pin:
        return Stored(*(stored.read(pin=True) for stored in both))
    for stored in both:
        stored.fetch()
    return Stored(*both)


def subtract(pair: ModelPair, name: str, stored: Stored, device: str = "cpu") -> Difference:
    """The difference of a 2-D parameter, or of one expert's matrix, on a device.

    On a CPU block by block, so that all but the delta stays in its caches; and in memory that the
    thread's next call uses again, because fresh pages take longer than what is put there.

    Raises:
        CheckpointError: an infinite or NaN value.
    """
    info = pair.infos[name]
    rows, columns = info.shape[-2:]
    on_cpu = device == "cpu"
    step = max(1, _CACHED_ELEMENTS // columns) if on_cpu else rows
    delta = _own("delta", rows, columns) if on_cpu else torch.empty(rows, columns, device=device)
    sums, norms = UlpSums(columns, pair.tuned.infos[name].dtype, device), []
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        old, new = (_rows_on(x, block, device, key)
                    for x, key in zip(stored, Stored._fields, strict=True))
        sums.add(old, new)
        norms.append((frobenius(torch.sub(new, old, out=delta[block])), frobenius(old)))
    delta_norm, base_norm = (math.hypot(*column) for column in zip(*norms, strict=True))
    _require_finite(pair, name, base_norm, delta_norm)
    return Difference(delta, delta_norm, base_norm, sums.noise())


def _rows_on(matrix: torch.Tensor | StoredTensor, rows: slice, device: str,
             key: str) -> torch.Tensor:
    """Rows of a matrix as fp32 on a device; those read from a disk in the thread's own memory."""
    if not isinstance(matrix, StoredTensor):
        return _to_fp32(matrix[rows], device)
    columns = matrix.info.shape[1]
    count = rows.stop - rows.start
    space = _own(f"{key} as stored", count, columns * DTYPE_BYTES[matrix.info.dtype], torch.uint8)
    return _own(key, count, columns).copy_(matrix.read(rows, into=space.view(-1)))


def _own(key: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[rows, columns], in memory that belongs to the calling thread and is used again by it."""
    size, kept = rows * columns, _THREAD.__dict__
    if len(kept.get(key, ())) < size:
        kept[key] = torch.empty(size, dtype=dtype)
    return kept[key][:size].view(rows, columns)


def read_delta(pair: ModelPair, name: str, device: str = "cpu") -> tuple[torch.Tensor, float]:
    """Return `(tuned - base, ||base||_F)` of one parameter; the delta is fp32 on `device`.

    Raises:
        CheckpointError: an infinite or NaN value.
    """
    base, tuned = (_to_fp32(files.read(name), device) for files in (pair.base, pair.tuned))
    base_norm, delta = frobenius(base), tuned.sub_(base)
    _require_finite(pair, name, base_norm, frobenius(delta))
    return delta, base_norm


def delta_blocks(pair: ModelPair, name: str) -> Iterator[tuple[torch.Tensor, float, float]]:
    """Blocks of rows of `(delta, ||delta||_F, ||base||_F)`, so that memory is bounded by a block.

    Raises:
        CheckpointError: an infinite or NaN value.
    """
    base, tuned = pair.base.stored(name), pair.tuned.stored(name)
    for rows in _rows_of(pair.infos[name].shape):
        old, delta = _to_fp32(base.read(rows), "cpu"), _to_fp32(tuned.read(rows), "cpu")
        delta.sub_(old)
        norms = frobenius(delta), frobenius(old)
        _require_finite(pair, name, *norms)
        yield delta, *norms


def is_unchanged(pair: ModelPair, name: str) -> bool:
    """Whether a parameter is the same in both models bit for bit; reads up to a difference.

    Raises:
        CheckpointError: an infinite or NaN value in what is the same.
    """
    base, tuned = pair.base.stored(name), pair.tuned.stored(name)
    for rows in _rows_of(pair.infos[name].shape):
        old, new = base.read(rows), tuned.read(rows)
        if not _same_bits(old, new):
            return False
        if old.numel():
            _require_finite(pair, name, *(float(x) for x in torch.aminmax(old)))
    return True


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    one, other = (x.reshape(-1).view(torch.uint8) for x in (one, other))
    whole = len(one) // 8 * 8  # torch compares wide integers five times faster than bytes
    return (torch.equal(one[:whole].view(torch.int64), other[:whole].view(torch.int64))
            and torch.equal(one[whole:], other[whole:]))


def _rows_of(shape: tuple[int, ...]) -> Iterator[slice]:
    """Blocks of rows that fp32 scratch is bounded by; one for a number."""
    step = max(1, _BLOCK_BYTES // max(1, 4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step) if shape else (0,):
        yield slice(start, start + step)


def _to_fp32(x: torch.Tensor, device: str) -> torch.Tensor:
    """Moved as it is stored, because 16 bits travel faster than 32; a tensor read for this use."""
    return x.to(device, non_blocking=True).float()


def _require_finite(pair: ModelPair, name: str, *norms: float) -> None:
    if not all(map(math.isfinite, norms)):
        raise CheckpointError(f"tensor {name} of {pair.base.directory} or {pair.tuned.directory} "
                              "holds infinite or NaN values; take a checkpoint from before the "
                              "training diverged")


def layer_of(name: str) -> int | None:
    """The decoder layer that a parameter or module belongs to, None outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def is_linear(info: TensorInfo) -> bool:
    """Whether LoRA factors can hold this delta: a 2-D weight of a decoder layer.

    So is each expert's own weight (`.experts.3.up_proj.weight`), the form in which checkpoints of
    most mixtures of experts are stored. Their router is not: it is small, serving engines take no
    LoRA on it, and an approximate one sends tokens to other experts.

    Raises:
        CompatibilityError: a weight of more dimensions that is not of experts; see `is_experts`.
    """
    if len(info.shape) > 2 and not is_experts(info):
        raise CompatibilityError(f"tensor {info.name} {list(info.shape)} has {len(info.shape)} "
                                 "dimensions; only matrices, and experts stored in one tensor "
                                 "[experts, rows, columns], are supported")
    return (len(info.shape) == 2 and layer_of(info.name) is not None
            and info.name.endswith(".weight") and not info.name.endswith(_ROUTER_SUFFIXES))


def is_experts(info: TensorInfo) -> bool:
    """Whether a parameter holds one matrix for each expert of a layer: [experts, rows, columns]."""
    return (len(info.shape) == 3 and layer_of(info.name) is not None
            and _EXPERTS.search(info.name) is not None)


def is_vocabulary(name: str) -> bool:
    """Whether a parameter is the embedding or the output head."""
    return name == HEAD_NAME or name.endswith(EMBEDDING_SUFFIX)


def in_layer_order(names: Iterable[str]) -> list[str]:
    """Sort by layer number, then by name; what lies outside the layers comes last."""
    def key(name: str) -> tuple[float, str]:
        layer = layer_of(name)
        return (float("inf") if layer is None else layer, name)
    return sorted(names, key=key)


def frobenius(x: torch.Tensor) -> float:
    """||x||_F, squares summed in fp64 so that the result does not depend on the size."""
    return frobenius_squared(x) ** 0.5


def residual_norm(delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, *,
                  total: float | None = None, cross: float | None = None) -> float:
    """||delta - lora_B @ lora_A||_F.

    By ||D||^2 - 2 <B^T D, A> + <B^T B, A A^T>, which makes no second matrix of the delta's size;
    block of rows by block of rows where so little is left that the difference would be rounding.

    Args:
        total: ||D||_F^2, where it is known.
        cross: <D, B A>, where it is known; a projection B A = U U^T D has ||B A||_F^2.
    """
    lora_a, lora_b = lora_a.float(), lora_b.float()
    wide_a, wide_b = lora_a.double(), lora_b.double()
    if total is None:
        total = frobenius_squared(delta)
    if cross is None:
        cross = float(((lora_b.T @ delta).double() * wide_a).sum())
    product = float(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum())
    left = total - 2 * cross + product
    if left > _LEAST_LEFT * total and math.isfinite(left):
        return left ** 0.5
    total, start = 0.0, 0
    for rows in _row_blocks(delta):
        total += frobenius_squared(torch.addmm(rows, lora_b[start:start + rows.shape[0]], lora_a,
                                               alpha=-1))
        start += rows.shape[0]
    return total ** 0.5


def _row_blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.split(max(1, _BLOCK_BYTES // (4 * x.shape[1])))
