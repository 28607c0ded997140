"""A base model with an adapter added in memory, as `extend merge` would write it."""

from pathlib import Path
from typing import TYPE_CHECKING

from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import ModelIdentity, parameter_infos
from extend.checkpoint import Checkpoint
from extend.delta.sources import AdapterDelta
from extend.errors import CompatibilityError
from extend.model_config import ModelConfig, parse_config, read_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def adapted_config(model: Path | str, adapter: Path | str | None) -> ModelConfig:
    """The config that is evaluated: that of the model, with the RoPE of the adapter's sidecar.

    Raises:
        CompatibilityError: the adapter was made for another base.
    """
    config = read_config(model)
    if adapter is None:
        return config
    sidecar = Adapter(adapter).sidecar
    if sidecar is None:
        return config
    found = ModelIdentity.of(config, parameter_infos(config, Checkpoint(model)))
    problems = sidecar.base.differences(found, f"the base of {adapter}", str(model))
    if problems:
        raise CompatibilityError(f"{adapter}: was made for another model than {model}: "
                                 f"{'; '.join(problems)}; give the base it was extracted from or a "
                                 "fine-tune of it")
    return parse_config(sidecar.rope.apply(config.raw), config.path)


def add_adapter(model: "PreTrainedModel", directory: Path | str) -> None:
    """Add an adapter's deltas to a loaded model: summed in fp32, rounded once.

    Raises:
        CompatibilityError: a module the model does not have, or of another shape.
    """
    source = AdapterDelta(Adapter(directory))
    for name in sorted(source.names):
        weight = _parameter(model, name, source.adapter)
        _add(weight, source.read(name, str(weight.device))(...), f"{directory}: {name}")


def _parameter(model: "PreTrainedModel", name: str, adapter: Adapter) -> "Tensor":
    try:
        return model.get_parameter(name).data
    except AttributeError:
        raise CompatibilityError(f"{adapter.directory}: changes {name}, which "
                                 f"{type(model).__name__} does not have; it was made for another "
                                 "architecture") from None


def _add(weight: "Tensor", delta: "Tensor", where: str) -> None:
    if weight.shape != delta.shape:
        raise CompatibilityError(f"{where} is a delta of shape {list(delta.shape)}, but the model "
                                 f"has {list(weight.shape)} there; it was made for another model")
    weight.copy_(weight.float() + delta.to(weight.device))
