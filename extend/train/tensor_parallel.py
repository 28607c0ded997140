"""Heads, MLP channels and vocabulary of a model, split over the processes of a group.

Which linear layers are split, and how, is transformers' own plan for the model, its config's
`base_model_tp_plan`. It is honoured a module at a time, attention or MLP: the input is the same in
all processes, what is inside is split, the output is summed. So each such module costs one
all-reduce of its output, and its backward one of the gradient of its input. Embeddings and output
head are split by vocabulary, whatever the plan says of them.

Source: Megatron-LM, arXiv:1909.08053, section 3.
"""

import re
from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from transformers import PretrainedConfig, PreTrainedModel

from extend.errors import CompatibilityError
from extend.loading import read_hf_config
from extend.model_config import ModelConfig
from extend.train.local import split_module
from extend.train.vocabulary import split_embedding
from extend.train_options import TrainOptions

_COLUMNS, _ROWS, _SHARED = "colwise", "rowwise", "replicated_with_grad_allreduce"
_STYLES = (_COLUMNS, _ROWS, _SHARED)
_VOCABULARY = {"embedding_rowwise"}  # embeddings, which are split anyway

Plan = dict[str, dict[str, str]]
"""Name of a module, with `*` for numbers -> the style of each of its children."""


def check_tensor_parallel(options: TrainOptions, config: ModelConfig) -> None:
    """Check all of a model that has to divide, and that its plan is one that is honoured here.

    Raises:
        CompatibilityError: naming the number, or the part of the plan.
    """
    parts = options.tensor_parallel
    if parts == 1:
        return
    numbers = {"query heads": config.num_heads, "key and value heads": config.num_kv_heads,
               "channels of the MLP": config.intermediate_size,
               "tokens of the vocabulary": config.vocab_size}
    for what, number in numbers.items():
        if number % parts:
            raise CompatibilityError(
                f"{config.path}: the {number} {what} do not divide by tensor_parallel {parts}; "
                "choose a number that divides them, or spread rows over more processes instead")
    read_plan(read_hf_config(config.path.parent).get_text_config())


def read_plan(config: PretrainedConfig) -> Plan:
    """The plan that transformers has for a model, by the modules that it splits.

    Raises:
        CompatibilityError: there is none, or it has a style that is not honoured here.
    """
    plan: Plan = {}
    for name, style in (config.base_model_tp_plan or {}).items():
        module, _, child = name.rpartition(".")
        if style in _VOCABULARY and not module:
            continue
        if style not in _STYLES:
            raise CompatibilityError(
                f"{config.model_type}: transformers' tensor parallel plan has {style!r} for "
                f"{name}; only {', '.join(_STYLES)} are supported. Set tensor_parallel to 1 and "
                "spread rows over more processes instead")
        plan.setdefault(module, {})[child] = style
    for module, styles in plan.items():
        if not {_COLUMNS, _ROWS} <= set(styles.values()):
            raise CompatibilityError(
                f"{config.model_type}: transformers' tensor parallel plan splits {module} by "
                f"{', '.join(sorted(set(styles.values())))} only, not first by {_COLUMNS} and then "
                f"by {_ROWS}; set tensor_parallel to 1")
    if not plan:
        raise CompatibilityError(f"{config.model_type}: transformers has no tensor parallel plan "
                                 "for its layers; set tensor_parallel to 1")
    return plan


def split_model(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the model over `mesh`; its parameters turn into DTensors, adapters' too.

    Call it before `fully_shard`. Tied weights stay one.

    Raises:
        CompatibilityError: a part of the model that its plan does not know, or a size that does not
            divide.
    """
    decoder = model.get_decoder()
    plan = read_plan(decoder.config)
    for name, module in list(decoder.named_modules()):
        styles = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if styles is not None:
            _split_block(name, module, styles, mesh)
    _split_vocabulary(model, mesh)


def _split_block(name: str, block: nn.Module, styles: Mapping[str, str], mesh: DeviceMesh) -> None:
    for path, owner in block.named_modules(prefix=name):
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            placement = _placement(path.removeprefix(name).lstrip("."), leaf, styles)
            if placement is None:
                raise CompatibilityError(f"{path}.{leaf} is not in transformers' tensor parallel "
                                         "plan; set tensor_parallel to 1")
            _check_divides(f"{path}.{leaf}", parameter, placement, mesh)
            owner.register_parameter(leaf, _distribute(parameter, placement, mesh))
    split_module(block, mesh.get_group())


def _placement(path: str, leaf: str, styles: Mapping[str, str]) -> Placement | None:
    """How a parameter of the module `path`, seen from its block, is split; None: nobody knows.

    An adapter of a layer that is split along its output has its lora_B split along that too, one of
    a layer that is split along its input its lora_A.
    """
    child, _, part = path.partition(".")
    style = styles.get(child)
    role = part.split(".")[0]
    if style is None or role not in ("", "base_layer", "lora_A", "lora_B"):
        return None
    along_output = Replicate() if role == "lora_A" else Shard(0)
    along_input = Replicate() if role == "lora_B" or leaf == "bias" else Shard(1)
    return {_COLUMNS: along_output, _ROWS: along_input, _SHARED: Replicate()}[style]


def _check_divides(name: str, parameter: nn.Parameter, placement: Placement,
                   mesh: DeviceMesh) -> None:
    if isinstance(placement, Shard) and parameter.shape[placement.dim] % mesh.size():
        raise CompatibilityError(
            f"{name} of shape {tuple(parameter.shape)} does not divide by tensor_parallel "
            f"{mesh.size()} in dimension {placement.dim}; choose a number that divides it")


def _distribute(parameter: nn.Parameter, placement: Placement, mesh: DeviceMesh) -> nn.Parameter:
    """All processes have the same values, or none yet, so nothing is sent."""
    part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _split_vocabulary(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise CompatibilityError(
            f"{type(model).__name__}: embeddings of {type(embedding).__name__} and a head of "
            f"{type(head).__name__} cannot be split; set tensor_parallel to 1")
    tied = head.weight is embedding.weight
    embedding.weight = _distribute(embedding.weight, Shard(0), mesh)
    head.weight = embedding.weight if tied else _distribute(head.weight, Shard(0), mesh)
    split_embedding(embedding, mesh)
