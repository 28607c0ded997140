"""Another RoPE for a model that is loaded already."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from extend.errors import CompatibilityError
from extend.model_config import RopeSpec, write_rope

RotaryModules = list[tuple[nn.Module, str, nn.Module]]
"""Where a model keeps a rotary embedding: the module that has it, by which name, and what is put
there."""


def set_rope(model: PreTrainedModel, raw: Mapping[str, Any], rope: RopeSpec, length: int,
             device: torch.device) -> None:
    """Give the model the rotary embedding that a checkpoint with this RoPE would load with.

    Args:
        raw: keys of the checkpoint's config.json.
        length: tokens, the longest row that will be read.

    Raises:
        CompatibilityError: the model has no module `rotary_emb`.
    """
    place_rotary(make_rotary(model, raw, rope, length, device))


def make_rotary(model: PreTrainedModel, raw: Mapping[str, Any], rope: RopeSpec, length: int,
                device: torch.device) -> RotaryModules:
    """What `set_rope` would put into the model, to change between several without making them."""
    config = type(model.config).from_dict(write_rope(raw, rope, length))
    found = [(parent, name, child) for parent in model.modules()
             for name, child in parent.named_children() if name == "rotary_emb"]
    if not found:
        raise CompatibilityError(f"{model.config.architectures}: has no module rotary_emb whose "
                                 "frequencies could be set")
    return [(parent, name, type(rotary)(config=config).to(device))
            for parent, name, rotary in found]


def place_rotary(modules: RotaryModules) -> None:
    """Put what `make_rotary` made into the model."""
    for parent, name, rotary in modules:
        setattr(parent, name, rotary)
