"""What the tensors of a PEFT adapter file are, by their keys: factors, biases, whole values."""

import math
import re
from collections.abc import Iterable, Mapping
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

# Of expressions in a config, which are matched against names: those that take a time without bound
# (a repeated group, a reference back, one that looks around), and more repetitions than two.
_RISKY = re.compile(r"\)[*+{]|\\\d|\(\?")
_REPEATS = re.compile(r"[*+{]")
_MAX_REPEATS, _MAX_PATTERN, _MAX_NAME = 2, 256, 256

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


def check_entries(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError when entries that are read are of another kind, or not safe to use."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if patterns is not None and not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {key} is {str(patterns)[:100]!r}, not an object")
        for pattern in patterns or ():
            problem = _pattern_problem(pattern)
            if problem:
                raise CheckpointError(f"{path}: {key} {pattern[:100]!r} {problem}; write the names "
                                      "of modules")
    for key, kind in (("modules_to_save", list), ("base_model_name_or_path", str),
                      ("revision", str)):
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{path}: {key} is {str(value)[:100]!r}, not a {kind.__name__}")
    if not all(isinstance(name, str) for name in config.get("modules_to_save") or ()):
        raise CheckpointError(f"{path}: modules_to_save holds what is no name")


def check_names(names: Iterable[str], path: Path) -> None:
    """Raise CheckpointError for tensors with names so long that no expression can be tried."""
    for name in names:
        if len(name) > _MAX_NAME:
            raise CheckpointError(f"{path}: the name {name[:100]!r}... of a tensor is longer than "
                                  f"{_MAX_NAME} characters; no model has such")


def _pattern_problem(pattern: str) -> str | None:
    if len(pattern) > _MAX_PATTERN:
        return f"is longer than {_MAX_PATTERN} characters"
    if _RISKY.search(pattern) or len(_REPEATS.findall(pattern)) > _MAX_REPEATS:
        return "is an expression whose matching may take for ever"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    return None


def refuse_variants(config: Mapping[str, Any], path: Path) -> None:
    """Raise CompatibilityError for an adapter that is more than W + scaling * B A."""
    check_entries(config, path)
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
    check_names(infos, path)
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
    announced = by_pattern(config.get("rank_pattern"), name, config.get("r"))
    alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not rank == rank_b == announced or rank < 1:
        raise CheckpointError(f"{path}: module {name} has rank {rank} in lora_A, {rank_b} in "
                              f"lora_B and {announced} in {ADAPTER_CONFIG}; they must agree")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise CheckpointError(f"{path.with_name(ADAPTER_CONFIG)}: lora_alpha of {name} is "
                              f"{alpha!r}, not a number")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(name, rank, scaling, out_features, in_features)


def by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry of the first key that fits the end of a module name.

    Source: `get_pattern_key` in peft/utils/other.py, PEFT 0.21: keys are regular expressions that
    must match whole dotted components up to the end.
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
