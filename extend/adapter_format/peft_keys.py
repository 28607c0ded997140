"""What the tensors of a PEFT adapter file are, by their keys: factors, biases, whole values."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from extend.checkpoint import FLOAT_DTYPES, TensorInfo
from extend.errors import CheckpointError, CompatibilityError

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_KINDS = {"factor": re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight"),
          "embedding": re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])"),
          "bias": re.compile(r"(?P<module>.+)\.lora_B\.bias")}
_DIMENSIONS = {"factor": 2, "embedding": 2, "bias": 1}

# Config entries under which W + scaling * B A is not the adapted weight.
_REFUSED = {
    "use_dora": "DoRA rescales every output row", "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "block-diagonal factors", "kasa_config": "KaSA changes the base weights",
    "alora_invocation_tokens": "activated LoRA applies to a part of the tokens only",
    "arrow_config": "a router over several adapters", "monteclora_config": "MonteCLoRA",
    "layer_replication": "copied layers", "trainable_token_indices": "trained embedding rows",
    "target_parameters": "adapted expert parameters", "fan_in_fan_out": "transposed weights"}
# Initialisations that subtract the first B A from the base, so that the plain base does not fit.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraModule(NamedTuple):
    """One adapted linear weight [out_features, in_features]; `scaling` multiplies B @ A."""

    name: str
    rank: int
    scaling: float
    out_features: int
    in_features: int


class AdapterTensors(NamedTuple):
    """The content of an adapter file.

    Attributes:
        modules: module -> the linear weight that it adapts.
        embeddings: parameter -> its factors, of which `out_features` counts the hidden sizes and
            `in_features` the tokens; the parameter is [in_features, out_features].
        biases: parameter -> the scaling of the bias of its module's lora_B, which is a delta.
        absolutes: parameters whose whole values are stored, as for `modules_to_save`.
    """

    modules: dict[str, LoraModule]
    embeddings: dict[str, LoraModule]
    biases: dict[str, float]
    absolutes: frozenset[str]


def refuse_variants(config: Mapping[str, Any], path: Path) -> None:
    """Raise CompatibilityError for an adapter that is more than W + scaling * B A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CompatibilityError(f"{path}: peft_type is {kind!r}; only 'LORA' can be merged")
    problems = [f"{key} is {config[key]!r} ({why})" for key, why in _REFUSED.items()
                if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r} (trained biases that would replace the "
                        "target's own)")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        problems.append(f"init_lora_weights is {init!r} (it changes the base weights; convert the "
                        "adapter with PEFT's path_initial_model_for_weight_conversion)")
    if problems:
        raise CompatibilityError(f"{path}: not a plain LoRA adapter: {'; '.join(problems)}; merge "
                                 "it with PEFT instead")


def sort_tensors(infos: Mapping[str, TensorInfo], config: Mapping[str, Any],
                 path: Path) -> AdapterTensors:
    """Say of every tensor in an adapter file what it is; `path` is for messages.

    Raises:
        CheckpointError: a factor without the other, or ranks that do not agree.
        CompatibilityError: a tensor of another kind.
    """
    factors: dict[str, dict[str, TensorInfo]] = {}
    transposed: dict[str, dict[str, TensorInfo]] = {}
    biased, absolutes = [], set()
    for key, info in infos.items():
        kind, match = _match(key)
        if match is None and _is_saved(key, config.get("modules_to_save")):
            absolutes.add(key.removeprefix(PREFIX))
        elif match is None or len(info.shape) != _DIMENSIONS[kind]:
            raise _other(path, key, info)
        elif kind == "bias":
            biased.append(match["module"])
        else:
            group = factors if kind == "factor" else transposed
            group.setdefault(match["module"], {})[f"lora_{match['factor']}"] = info
        if info.dtype not in FLOAT_DTYPES:
            raise _other(path, key, info)
    modules = _check_pairs(factors, config, path)
    for name in biased:
        if name not in modules:
            raise CheckpointError(f"{path}: module {name} has a bias on lora_B but no lora_B; "
                                  "fetch or extract the adapter again")
    for name in config.get("modules_to_save") or ():
        if not any(_is_saved(f"{PREFIX}{saved}", [name]) for saved in absolutes):
            raise CheckpointError(f"{path}: modules_to_save is {config['modules_to_save']!r}, but "
                                  f"the file holds no values of {name}; fetch the adapter again")
    return AdapterTensors(
        modules, {f"{name}.weight": module
                  for name, module in _check_pairs(transposed, config, path).items()},
        {f"{name}.bias": modules[name].scaling for name in biased}, frozenset(absolutes))


def _match(key: str) -> tuple[str, re.Match[str] | None]:
    if key.startswith(PREFIX):
        for kind, pattern in _KINDS.items():
            if match := pattern.fullmatch(key.removeprefix(PREFIX)):
                return kind, match
    return "", None


def _is_saved(key: str, modules_to_save: Any) -> bool:
    """Whether the key is a plain parameter of a module that the config names.

    Source: PEFT takes every module whose name ends with one of the names (`_set_trainable` in
    peft/utils/other.py).
    """
    module, _, leaf = key.removeprefix(PREFIX).rpartition(".")
    return (key.startswith(PREFIX) and leaf in ("weight", "bias")
            and any(module.endswith(name) for name in modules_to_save or ()))


def _other(path: Path, key: str, info: TensorInfo) -> CompatibilityError:
    return CompatibilityError(
        f"{path}: tensor {key!r} {info.dtype} {list(info.shape)} is not a lora_A or lora_B of a "
        "linear weight or an embedding, nor of a module that modules_to_save names; merge this "
        "adapter with PEFT instead")


def _check_pairs(pairs: Mapping[str, Mapping[str, TensorInfo]], config: Mapping[str, Any],
                 path: Path) -> dict[str, LoraModule]:
    return {name: _check_pair(name, pair, config, path) for name, pair in sorted(pairs.items())}


def _check_pair(name: str, pair: Mapping[str, TensorInfo], config: Mapping[str, Any],
                path: Path) -> LoraModule:
    if len(pair) != 2:
        raise CheckpointError(f"{path}: module {name} has {next(iter(pair))} but not the other "
                              "factor; fetch or extract the adapter again")
    (rank, in_features), (out_features, rank_b) = pair["lora_A"].shape, pair["lora_B"].shape
    announced = _by_pattern(config.get("rank_pattern"), name, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not rank == rank_b == announced or rank < 1:
        raise CheckpointError(f"{path}: module {name} has rank {rank} in lora_A, {rank_b} in "
                              f"lora_B and {announced} in {ADAPTER_CONFIG}; they must agree")
    if not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{path.with_name(ADAPTER_CONFIG)}: lora_alpha of {name} is "
                              f"{alpha!r}, not a number")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(name, rank, scaling, out_features, in_features)


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry of the first key that fits the end of a module name.

    Source: `get_pattern_key` in peft/utils/other.py, PEFT 0.21: keys are regular expressions that
    must match whole dotted components up to the end.
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
