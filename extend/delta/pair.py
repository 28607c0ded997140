"""tuned - base, one parameter at a time, in fp32."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from extend.adapter_format.sidecar import (
    EMBEDDING_SUFFIX,
    HEAD_NAME,
    ModelIdentity,
    parameter_infos,
)
from extend.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from extend.delta.noise import Noise, rounding_noise
from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import ModelConfig, read_config

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ROUTER_SUFFIX = ".gate.weight"
_ROWS_BYTES = 2**27  # fp32 scratch of `frobenius` and `residual_norm`


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


def read_delta(pair: ModelPair, name: str, device: str = "cpu") -> tuple[torch.Tensor, float]:
    """Return `(tuned - base, ||base||_F)` of one parameter; the delta is fp32 on `device`.

    Raises:
        CheckpointError: an infinite or NaN value.
    """
    return _subtract(pair, name, *_read_both(pair, name, device))


def read_linear_delta(pair: ModelPair, name: str,
                      device: str = "cpu") -> tuple[torch.Tensor, float, Noise]:
    """`read_delta` of a 2-D parameter, and the noise that its stored dtype put into the delta.

    Raises:
        CheckpointError: an infinite or NaN value.
    """
    base, tuned = _read_both(pair, name, device)
    noise = rounding_noise(base, tuned, pair.tuned.infos[name].dtype)
    return *_subtract(pair, name, base, tuned), noise


def _read_both(pair: ModelPair, name: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in fp32; the second is a copy that may be written to."""
    return (pair.base.read(name).to(device, torch.float32),
            pair.tuned.read(name).to(device, torch.float32, copy=True))


def _subtract(pair: ModelPair, name: str, base: torch.Tensor,
              tuned: torch.Tensor) -> tuple[torch.Tensor, float]:
    delta, base_norm = tuned.sub_(base), frobenius(base)
    if not torch.isfinite(torch.tensor(base_norm)) or not bool(torch.isfinite(delta).all()):
        raise CheckpointError(f"tensor {name} of {pair.base.directory} or {pair.tuned.directory} "
                              "holds infinite or NaN values; take a checkpoint from before the "
                              "training diverged")
    return delta, base_norm


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
        CompatibilityError: a weight of more dimensions, such as all experts in one.
    """
    if len(info.shape) > 2:
        raise CompatibilityError(f"tensor {info.name} {list(info.shape)} holds several matrices, "
                                 "such as all experts of a layer; only weights stored one expert "
                                 "a tensor (.experts.0.up_proj.weight) are supported yet")
    return (len(info.shape) == 2 and layer_of(info.name) is not None
            and info.name.endswith(".weight") and not info.name.endswith(_ROUTER_SUFFIX))


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
    return sum(float(rows.double().square().sum()) for rows in _row_blocks(x)) ** 0.5


def residual_norm(delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> float:
    """||delta - lora_B @ lora_A||_F, block of rows by block of rows."""
    lora_a, lora_b = lora_a.float(), lora_b.float()
    blocks = _row_blocks(delta)
    total, start = 0.0, 0
    for rows in blocks:
        gap = rows - lora_b[start:start + rows.shape[0]] @ lora_a
        total += float(gap.double().square().sum())
        start += rows.shape[0]
    return total ** 0.5


def _row_blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if x.dim() < 2:
        return (x,)
    return x.split(max(1, _ROWS_BYTES // (4 * x.shape[1])))
