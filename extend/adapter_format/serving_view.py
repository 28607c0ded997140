"""An adapter directory as a serving engine sees it: config keys, tensor names and shapes.

Nothing is refused here that some engine might take: `Adapter` reads what this toolkit can merge,
this reads what anyone may have written.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from extend.adapter_format.peft_files import TensorFile, find_weights
from extend.adapter_format.peft_keys import (
    ADAPTER_CONFIG,
    PREFIX,
    by_pattern,
    check_entries,
    check_names,
)
from extend.adapter_format.sidecar import Sidecar, read_sidecar
from extend.checkpoint import TensorInfo
from extend.errors import CheckpointError
from extend.model_config import read_json

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_[AB](?=\.)|lora_embedding_[AB])"
                     r"(?P<adapter>\.default)?(?:\.weight)?")
_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<projection>\w+)")
_REQUIRED = ("r", "lora_alpha", "target_modules")


@dataclass(frozen=True, kw_only=True)
class ServingView:
    """What engines look at.

    Attributes:
        config: adapter_config.json.
        factors: module -> factor (lora_A, lora_B, lora_embedding_A, ..) -> its header entry.
        others: names of all other tensors, without `base_model.model.`.
        unusual: names of factors with the adapter's name in them (`.lora_A.default.weight`).
        sidecar: None for an adapter of another program; with it, the base's parameters are known.
        added_tokens: ids in added_tokens.json.
    """

    directory: Path
    config: Mapping[str, Any]
    factors: Mapping[str, Mapping[str, TensorInfo]]
    others: tuple[str, ...]
    unusual: tuple[str, ...]
    sidecar: Sidecar | None
    added_tokens: tuple[int, ...]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """module -> rows of its first factor, the rank it has in the file."""
        return {module: pair.get("lora_A", pair.get("lora_embedding_A",
                                                    next(iter(pair.values())))).shape[0]
                for module, pair in self.factors.items()}

    @cached_property
    def largest_rank(self) -> int:
        """The largest rank that the config names or the file holds."""
        named = (self.config.get("rank_pattern") or {}).values()
        return max([self.config["r"], *named, *self.ranks.values()])

    @cached_property
    def base_modules(self) -> frozenset[str] | None:
        """Modules of the base that hold a weight; None where no sidecar tells."""
        if self.sidecar is None:
            return None
        return frozenset(name.removesuffix(".weight") for name in self.sidecar.base.shapes
                         if name.endswith(".weight"))

    def scaling(self, module: str) -> float:
        """What PEFT multiplies B A of this module by."""
        alpha = by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        rank = by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def experts(self) -> dict[tuple[str, str], dict[int, int]]:
        """(block, projection) -> expert -> rank, of adapted experts stored one by one."""
        found: dict[tuple[str, str], dict[int, int]] = {}
        for module, rank in self.ranks.items():
            match = _EXPERT.fullmatch(module)
            if match:
                key = (match["block"], match["projection"])
                found.setdefault(key, {})[int(match["expert"])] = rank
        return found


def read_view(directory: Path | str) -> ServingView:
    """Read headers and configs of an adapter directory.

    Raises:
        CheckpointError: a file is missing, damaged, or lacks what every engine needs.
    """
    directory = Path(directory)
    config = read_json(directory / ADAPTER_CONFIG)
    check_entries(config, directory / ADAPTER_CONFIG)
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: {', '.join(missing)} missing; every "
                              "engine needs them, so save the adapter with PEFT again")
    _check_numbers(config, directory)
    factors: dict[str, dict[str, TensorInfo]] = {}
    others, unusual = [], []
    weights = TensorFile(find_weights(directory))
    check_names(weights.infos, weights.path)
    for key, info in weights.infos.items():
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match is None:
            others.append(name)
            continue
        factors.setdefault(match["module"], {})[match["factor"]] = info
        if match["adapter"]:
            unusual.append(name)
    if not factors:
        raise CheckpointError(f"{directory}: holds no LoRA factors")
    tokens = directory / "added_tokens.json"
    return ServingView(
        directory=directory, config=config, factors=factors, others=tuple(others),
        unusual=tuple(unusual), sidecar=read_sidecar(directory),
        added_tokens=tuple(read_json(tokens).values()) if tokens.is_file() else ())


def _check_numbers(config: Mapping[str, Any], directory: Path) -> None:
    patterns = {f"{key} of {name}": value for key in ("rank_pattern", "alpha_pattern")
                for name, value in (config.get(key) or {}).items()}
    for key, value in {"r": config["r"], "lora_alpha": config["lora_alpha"], **patterns}.items():
        whole = not key.startswith(("r", "rank")) or isinstance(value, int)
        if isinstance(value, bool) or not isinstance(value, int | float) or not whole or value <= 0:
            raise CheckpointError(f"{directory / ADAPTER_CONFIG}: {key} is {value!r}; it must be a "
                                  "number above 0, and whole where it is a rank")
