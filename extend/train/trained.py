"""Which parameters are trained: all, those that expressions match, or adapters and some beside."""

import math
import re

import torch
from torch import nn
from transformers import PreTrainedModel

from extend.errors import RecipeError, TrainingError
from extend.train.precision import set_dtypes
from extend.train.weights import local_part, own_part
from extend.train_options import TrainOptions

ADAPTER = "default"  # PEFT's name for the adapter


def choose_trained(model: PreTrainedModel, options: TrainOptions) -> None:
    """Freeze what is not trained, and add adapters where the options ask for them.

    Raises:
        RecipeError: an expression in `trainable` or `trained_beside` that matches nothing or is
            none.
    """
    if options.mode == "lora":
        beside = _parameters_beside(model, options.trained_beside)
        _add_adapters(model, options, beside)
        for parameter in beside.values():
            parameter.requires_grad_(True)
    else:
        _freeze_unmatched(model, options.trainable)
    set_dtypes(model, options)


def _matching(names: list[str], expressions: list[str], key: str = "trainable") -> list[str]:
    """The names that some expression matches; all when there is none.

    Raises:
        RecipeError: an expression that is not valid or matches no name.
    """
    chosen: set[str] = set()
    for expression in expressions:
        try:
            found = [name for name in names if re.search(expression, name)]
        except re.error as error:
            raise RecipeError(f"{key}: {expression!r} is no regular expression "
                              f"({error})") from None
        if not found:
            raise RecipeError(f"{key}: {expression!r} matches no parameter; names are like "
                              f"{names[0]}, {names[len(names) // 2]}, {names[-1]}")
        chosen.update(found)
    return [name for name in names if name in chosen or not expressions]


def _freeze_unmatched(model: nn.Module, expressions: list[str]) -> None:
    trained = set(_matching([name for name, _ in model.named_parameters()], expressions))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _parameters_beside(model: PreTrainedModel, wanted: list[str]) -> dict[str, nn.Parameter]:
    """Name -> parameter of what to train whole beside adapters: norms, embeddings, what matches.

    A head that is tied to the embeddings is trained with them.

    Raises:
        RecipeError: an expression that is not valid or matches no name.

    Source: LongLoRA, arXiv:2309.12307, section 3.3, trains norms and embeddings (its code: names
        with `norm` or `embed`).
    """
    names, chosen, expressions = [name for name, _ in model.named_parameters()], set(), []
    for each in wanted:
        if each == "norms":
            chosen |= {f"{name}.{leaf}" for name, module in model.named_modules()
                       if type(module).__name__.endswith("Norm")
                       for leaf, _ in module.named_parameters(recurse=False)}
        elif each == "embeddings":
            embeddings = model.get_input_embeddings().weight
            chosen |= {name for name, p in model.named_parameters() if p is embeddings}
        else:
            expressions.append(each)
    if expressions:
        chosen.update(_matching(names, expressions, "trained_beside"))
    return {name: p for name, p in model.named_parameters() if name in chosen}


def _add_adapters(model: PreTrainedModel, options: TrainOptions,
                  beside: dict[str, nn.Parameter]) -> None:
    """Put LoRA on the decoder's linear layers; `trainable` is matched with their weights' names.

    Raises:
        RecipeError: an expression in `trainable` is not valid or matches no name, or a layer that
            gets an adapter is among those `beside` it.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    names = [f"{name}.weight" for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and module is not head]
    adapted = _matching(names, options.trainable)
    for name in adapted:
        if name in beside:
            raise RecipeError(f"trained_beside: {name} would be trained whole and get an adapter; "
                              "leave it out there, or out of trainable")
    targets = [name.removesuffix(".weight") for name in adapted]
    lora = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha or options.lora_rank,
                      lora_dropout=0.0, target_modules=targets)
    inject_adapter_in_model(lora, model, adapter_name=ADAPTER)


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Give adapters their first values, the same however they are sharded: B is zero, A is drawn.

    A is uniform as in a linear layer of torch, which is PEFT's choice too.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            lora_a, lora_b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            drawn = nn.init.kaiming_uniform_(torch.empty(lora_a.shape), a=math.sqrt(5),
                                             generator=generator)
            own = tuple(slice(begin, begin + size) for begin, size in zip(*own_part(lora_a)))
            local_part(lora_a).copy_(drawn[own])
            local_part(lora_b).zero_()


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is trained.

    Raises:
        TrainingError: nothing is.
    """
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise TrainingError("no parameter is trained; check mode and trainable")
    return found
