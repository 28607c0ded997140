"""Write the trained model as an HF checkpoint, tensor by tensor.

The file has exactly the tensors of the input checkpoint, by the same names: tied heads stay tied,
and what was not trained is copied from the input. Adapters are added to their weight in fp32 and
rounded once.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from extend.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
    dtype_name,
    torch_dtype,
    write_checkpoint,
)
from extend.errors import CompatibilityError
from extend.train.mesh import Processes
from extend.train.trained import ADAPTER

_STALE_SUFFIX = "rotary_emb.inv_freq"  # old files store it; it would contradict the new config


class Exporter:
    """Maps a trained model onto the tensors of the checkpoint it came from.

    Args:
        source: the checkpoint that was loaded.
        model: with adapters or without, sharded or whole.
        dtype: of the floating-point tensors written; None keeps each one's own.

    Raises:
        CompatibilityError: names of the model and of the checkpoint do not line up.
    """

    def __init__(self, source: Checkpoint, model: nn.Module, dtype: str | None):
        self.source, self.model = source, model
        self.tensors = _by_plain_name(model)
        self.infos = [self._info(name, dtype) for name in source.names
                      if not name.endswith(_STALE_SUFFIX)]
        self._check_names()

    def _info(self, name: str, dtype: str | None) -> TensorInfo:
        info = self.source.infos[name]
        if dtype is None or info.dtype not in FLOAT_DTYPES:
            return info
        return info._replace(dtype=dtype_name(getattr(torch, dtype)))

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

    def write(self, directory: Path, processes: Processes) -> None:
        """Gather every tensor on all processes, and write it in the main one."""
        self.tensors = _by_plain_name(self.model)  # sharding has put others in their place
        if processes.is_main:
            read = {info.name: info for info in self.infos}
            write_checkpoint(directory, self.infos, lambda name: self.value(read[name]))
        else:
            for info in self.infos:
                self.value(info)

    @torch.no_grad()
    def value(self, info: TensorInfo) -> Tensor:
        """The tensor to write; all processes must ask for the same ones in the same order."""
        dtype = torch_dtype(info.dtype)
        parameter = self.tensors[info.name]
        adapter = _adapter(self.model, info.name)
        if adapter is None and not parameter.requires_grad:
            return self.source.read(info.name).to(dtype)
        weight = _whole(parameter)
        if adapter is not None:
            lora_a, lora_b, scaling = adapter
            weight = self.source.read(info.name).to(weight.device, torch.float32)
            weight = weight + scaling * (_whole(lora_b).float() @ _whole(lora_a).float())
        return weight.to(dtype).cpu()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _by_plain_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have without adapters, aliases included."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" not in name:
            found[name.replace(".base_layer.", ".")] = parameter
    return found


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
