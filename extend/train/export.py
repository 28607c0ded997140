"""Write the trained model as an HF checkpoint, tensor by tensor.

The file has exactly the tensors of the input checkpoint, by the same names: tied heads stay tied,
and what was not trained is copied from the input. Adapters are added to their weight in fp32, some
rows at a time, and rounded once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from extend.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
    dtype_name,
    torch_dtype,
    write_checkpoint,
)
from extend.errors import CompatibilityError
from extend.model_config import ModelConfig, RopeSpec, write_rope
from extend.train.gather import Gather, make_gather
from extend.train.mesh import Processes
from extend.train.trained import ADAPTER
from extend.train.weights import plain_parameters, read_rows
from extend.train_options import Phase

_STALE_SUFFIX = "rotary_emb.inv_freq"  # old files store it; it would contradict the new config


class Exporter:
    """Maps a trained model onto the tensors of the checkpoint it came from.

    Args:
        source: the checkpoint that was loaded.
        model: with adapters or without, sharded or whole, or without values yet.
        dtype: of the floating-point tensors written; None keeps each one's own.

    Raises:
        CompatibilityError: names or shapes of the model and of the checkpoint do not line up.
    """

    def __init__(self, source: Checkpoint, model: nn.Module, dtype: str | None):
        self.source, self.model, self.dtype = source, model, dtype
        self.tensors = plain_parameters(model)
        self.infos = [self._info(name) for name in source.names
                      if not name.endswith(_STALE_SUFFIX)]
        self._check_names()

    def _info(self, name: str) -> TensorInfo:
        info = self.source.infos[name]
        if self.dtype is None or info.dtype not in FLOAT_DTYPES:
            return info
        return info._replace(dtype=dtype_name(getattr(torch, self.dtype)))

    def _check_names(self) -> None:
        written = {info.name for info in self.infos}
        strange = sorted(name for name in written if name not in self.tensors)
        # A tied head has a second name for a tensor that the file holds under the first.
        held = {id(self.tensors[name]) for name in written if name in self.tensors}
        lost = sorted(name for name, tensor in self.tensors.items()
                      if name not in written and id(tensor) not in held)
        if strange or lost:
            raise CompatibilityError(
                f"{self.source.directory}: the file and the model disagree about tensor "
                f"{(strange or lost)[0]!r}; checkpoints that transformers converts while loading "
                "cannot be trained yet")
        for info in self.infos:
            wanted = tuple(self.tensors[info.name].shape)
            if info.shape != wanted:
                raise CompatibilityError(
                    f"{self.source.directory}: tensor {info.name!r} has shape {info.shape} in the "
                    f"file, but {wanted} in the model; the weights are not those of this config")

    def config(self, config: ModelConfig, rope: RopeSpec, max_len: int) -> dict[str, Any]:
        """The keys of config.json that go with the tensors, under `rope` and for `max_len`."""
        keys = write_rope(config.raw, rope, max_len)
        if self.dtype is not None:
            keys["dtype" if "dtype" in keys else "torch_dtype"] = self.dtype
        return keys

    def write(self, directory: Path, processes: Processes, whole: Gather | None = None) -> None:
        """Write every tensor in the main process; all processes must call it.

        Args:
            whole: where the whole of what was trained comes from; its shards unless given.
        """
        self.tensors = plain_parameters(self.model)  # sharding has put others in their place
        whole = whole or make_gather(processes)
        if processes.is_main:
            read = {info.name: info for info in self.infos}
            write_checkpoint(directory, self.infos, lambda name: self._blocks(read[name], whole))
        else:
            for info in self.infos:
                self._gather(info, whole)

    def _gather(self, info: TensorInfo, whole: Gather) -> list[Tensor | None]:
        """What was trained of a tensor: lora_A and lora_B, or the tensor, or nothing."""
        parameter, adapter = self.tensors[info.name], _adapter(self.model, info.name)
        if adapter is not None:
            return [whole(factor, factor.dtype) for factor in adapter[:2]]
        return [whole(parameter, torch_dtype(info.dtype))] if parameter.requires_grad else []

    @torch.no_grad()
    def _blocks(self, info: TensorInfo, whole: Gather) -> Iterator[Tensor]:
        """The tensor to write, in blocks of rows."""
        dtype, stored = torch_dtype(info.dtype), self.source.stored(info.name)
        trained = self._gather(info, whole)
        if len(trained) == 1:
            yield trained[0]
        elif not trained:
            yield from (rows.to(dtype) for rows in read_rows(stored))
        else:
            scaling, device = _adapter(self.model, info.name)[2], self._device
            lora_a, lora_b = (factor.to(device, torch.float32) for factor in trained)
            done = 0
            for rows in read_rows(stored):
                weight = rows.to(device, torch.float32)
                weight = weight + scaling * (lora_b[done:done + len(rows)] @ lora_a)
                yield weight.to(dtype).cpu()
                done += len(rows)

    @property
    def _device(self) -> torch.device:
        """Where the model is; the CPU if it has no weights."""
        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device


def made_for(phases: Sequence[Phase], config: ModelConfig) -> int:
    """Tokens that a model trained in these phases is made for."""
    return max(config.max_position_embeddings,
               *(phase.reach for phase in phases))


def _adapter(model: nn.Module, name: str) -> tuple[Tensor, Tensor, float] | None:
    """lora_A [r, in], lora_B [out, r] and scaling of the layer whose weight is `name`, if any."""
    module_name, _, leaf = name.rpartition(".")
    try:
        layer = model.get_submodule(module_name)
    except AttributeError:
        return None
    if leaf != "weight" or not hasattr(layer, "lora_A"):
        return None
    return (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight,
            float(layer.scaling[ADAPTER]))
