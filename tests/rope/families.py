"""Every model family of the installed transformers that has RoPE keys in its config class."""

import copy
import logging
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from extend.errors import CompatibilityError
from extend.model_config import RopeSpec, read_rope
from extend.model_config.rope_read import head_dim_of

# Why a family is left out. Each name is told by `Families.skipped`.
NO_ARGUMENTS = "its config class wants arguments"
NO_TOKENS = "RoPE of image patches, not of token positions"
NO_DECODER = "no length, width or heads at the top level: not a decoder's config"
ODD = "its default config rotates an odd number of channels"
REFUSED = "refused by name"
# What is refused: RoPE that is not one for all full-attention layers, or has multimodal sections.
REFUSED_FAMILIES = {
    "beam", "cosmos3_edge_text", "deepseek_v4", "diffusion_gemma_text", "dots3_note_text",
    "embedding_gemma2_text", "gemma4_text", "gemma4_unified_text", "hy_v4_vl_text",
    "neomme", "zaya"}


@dataclass(frozen=True)
class Family:
    """A family's default config.

    Attributes:
        raw: its keys, as in a config.json that is complete.
        spec: RoPE of its full-attention layers as this toolkit reads it.
        head_dim: channels that `proportional` counts from.
    """

    name: str
    config_class: type[PreTrainedConfig]
    raw: dict[str, Any]
    spec: RopeSpec
    head_dim: int


def without_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """A config with no RoPE key at all."""
    bare = {k: v for k, v in raw.items() if "rope" not in k and "rotary" not in k
            and k != "original_max_position_embeddings"}
    return bare | {k: v for k, v in raw.items() if k == "qk_rope_head_dim"}


@dataclass(frozen=True)
class Families:
    read: list[Family]
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@cache
def installed() -> Families:
    """All families, and those left out by reason."""
    found = Families([])
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        for name in sorted(CONFIG_MAPPING):
            _add(name, found)
    finally:
        log.setLevel(level)
    return found


def _add(name: str, found: Families) -> None:
    config_class = CONFIG_MAPPING[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_class()
    except Exception:  # whatever a config class raises without arguments
        found.skipped[NO_ARGUMENTS].append(name)
        return
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    raw = copy.deepcopy(config.to_dict())
    if rope.get("rope_type") == "axial":
        found.skipped[NO_TOKENS].append(name)
    elif not all(raw.get(key) for key in ("max_position_embeddings", "hidden_size",
                                          "num_attention_heads")):
        found.skipped[NO_DECODER].append(name)
    else:
        _read(name, config_class, raw, found)


def _read(name: str, config_class: type[PreTrainedConfig], raw: dict[str, Any],
          found: Families) -> None:
    head_dim = head_dim_of(raw)
    try:
        spec = read_rope(raw, head_dim, Path("config.json"))[0]
    except CompatibilityError:
        found.skipped[REFUSED].append(name)
        return
    if spec.rotary_dim % 2:
        found.skipped[ODD].append(name)
        return
    found.read.append(Family(name, config_class, raw, spec,
                             raw.get("qk_rope_head_dim") or head_dim))


class DoubleTorch:
    """`torch` in whose eyes a float has 64 bits, to put into a module of transformers."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def arange(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.arange(*args, **kwargs).as_subclass(_Double)


class _Double(torch.Tensor):
    def float(self) -> torch.Tensor:
        return self.double()
