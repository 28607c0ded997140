"""The adapter directory: PEFT's two files, written as PEFT writes them and read without a model.

    adapter_config.json, adapter_model.safetensors      LoRA factors of linear weights
    extend_sidecar.json, extend_sidecar.safetensors     the rest (see `sidecar`)

Written adapters keep to what serving engines accept: linear lora_A and lora_B only, no
`modules_to_save`, alpha equal to rank in every module so that the scaling is 1 even for an engine
that ignores `rank_pattern` and `alpha_pattern`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from extend.adapter_format.sidecar import SIDECAR_WEIGHTS, Sidecar, read_sidecar
from extend.checkpoint import (
    FLOAT_DTYPES,
    TensorInfo,
    dtype_name,
    read_header,
    torch_dtype,
    write_safetensors,
)
from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import read_json
from extend.registry import lookup

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
STORE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<factor>lora_[AB])\.weight")

# Config entries under which W + scaling * B A is not the adapted weight.
_REFUSED = {
    "use_dora": "DoRA rescales every output row", "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "block-diagonal factors", "kasa_config": "KaSA changes the base weights",
    "alora_invocation_tokens": "activated LoRA applies to a part of the tokens only",
    "arrow_config": "a router over several adapters", "monteclora_config": "MonteCLoRA",
    "layer_replication": "copied layers", "trainable_token_indices": "trained embedding rows",
    "target_parameters": "adapted expert parameters", "lora_bias": "a bias on lora_B",
    "modules_to_save": "whole modules that would replace the target's own"}
# Initialisations that subtract the first B A from the base, so that the plain base does not fit.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraModule(NamedTuple):
    """One adapted linear weight [out_features, in_features]; `scaling` multiplies B @ A."""

    name: str
    rank: int
    scaling: float
    out_features: int
    in_features: int


class TensorFile:
    """One safetensors file whose tensors are read one at a time.

    Raises:
        CheckpointError: missing, truncated or damaged file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.infos = read_header(path)
        self._handle: Any = None

    def read(self, name: str) -> "torch.Tensor":
        from safetensors import SafetensorError, safe_open

        try:
            if self._handle is None:
                self._handle = safe_open(self.path, framework="pt")
            return self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read "
                                  f"({error})") from None


class Adapter:
    """A LoRA adapter in PEFT's format, with its sidecar if it has one.

    Attributes:
        modules: module name (such as `model.layers.0.mlp.up_proj`) -> `LoraModule`.
        sidecar: None for an adapter that another program wrote.

    Raises:
        CheckpointError: a file is missing, damaged, or the files do not belong together.
        CompatibilityError: a kind of adapter that is more than W + scaling * B A.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.config = read_json(self.directory / ADAPTER_CONFIG)
        _refuse_variants(self.config, self.directory / ADAPTER_CONFIG)
        self._weights = TensorFile(find_weights(self.directory))
        self.modules = _pair_factors(self._weights, self.config)
        self.sidecar = read_sidecar(self.directory)
        self._side_weights: TensorFile | None = None
        if self.sidecar is not None:
            self._side_weights = TensorFile(self.directory / SIDECAR_WEIGHTS)
            self._check_sidecar(self.sidecar, self._side_weights.infos)

    def _check_sidecar(self, sidecar: Sidecar, infos: Mapping[str, TensorInfo]) -> None:
        found = {name: info.shape for name, info in infos.items()}
        announced = {name: report.shape for name, report in sidecar.tensors.items()}
        ranks = {name: module.rank for name, module in self.modules.items()}
        announced_ranks = {name: report.rank for name, report in sidecar.modules.items()}
        for what, have, want in ((SIDECAR_WEIGHTS, found, announced),
                                 (ADAPTER_WEIGHTS, ranks, announced_ranks)):
            for name in sorted({*have, *want}):
                if have.get(name) != want.get(name):
                    raise CheckpointError(
                        f"{self.directory}: {name} is {have.get(name, 'absent')} in {what} but "
                        f"{want.get(name, 'absent')} in extend_sidecar.json; the files are of "
                        "different extractions, extract again")

    @property
    def dtype(self) -> str:
        """The safetensors name of the factors' dtype; F32 where they have several."""
        found = {info.dtype for info in self._weights.infos.values()}
        return found.pop() if len(found) == 1 else "F32"

    def read_factors(self, module: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """`(lora_A [r, in], lora_B [out, r])` of a module in fp32."""
        return (self._weights.read(f"{_PREFIX}{module}.lora_A.weight").float(),
                self._weights.read(f"{_PREFIX}{module}.lora_B.weight").float())

    def read_side_delta(self, name: str) -> "torch.Tensor":
        """The fp32 delta of a parameter that the sidecar holds."""
        if self._side_weights is None:
            raise CheckpointError(f"{self.directory}: has no sidecar, so no delta of {name!r}")
        return self._side_weights.read(name)


def find_weights(directory: Path) -> Path:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise CheckpointError(f"{directory}: holds adapter_model.bin, a pickle, which is not read; "
                              "load it with PEFT and save it as safetensors")
    return path


def _refuse_variants(config: Mapping[str, Any], path: Path) -> None:
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


def _pair_factors(file: TensorFile, config: Mapping[str, Any]) -> dict[str, LoraModule]:
    factors: dict[str, dict[str, TensorInfo]] = {}
    for key, info in file.infos.items():
        match = _KEY.fullmatch(key)
        if match is None or len(info.shape) != 2 or info.dtype not in FLOAT_DTYPES:
            raise CompatibilityError(
                f"{file.path}: tensor {key!r} {info.dtype} {list(info.shape)} is not a lora_A or "
                "lora_B of a linear weight; merge this adapter with PEFT instead")
        factors.setdefault(match["module"], {})[match["factor"]] = info
    if not factors:
        raise CheckpointError(f"{file.path}: holds no LoRA factors")
    return {name: _check_pair(name, pair, config, file.path)
            for name, pair in sorted(factors.items())}


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
    if not isinstance(alpha, (int, float)):
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


def write_adapter(directory: Path, factors: "Mapping[str, tuple[torch.Tensor, torch.Tensor]]",
                  *, base_name: str, all_modules: Iterable[str]) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        factors: module -> (lora_A [r, in], lora_B [out, r]), all of one dtype.
        base_name: path or repository of the base, for `base_model_name_or_path`.
        all_modules: every module of the base that has a weight; see `shorten`.
    """
    modules = [LoraModule(name, lora_a.shape[0], 1.0, lora_b.shape[0], lora_a.shape[1])
               for name, (lora_a, lora_b) in factors.items()]
    stream_adapter(directory, modules, dtype_name(next(iter(factors.values()))[0].dtype),
                   lambda name, factor: factors[name][factor == "lora_B"],
                   base_name=base_name, all_modules=all_modules)


def stream_adapter(directory: Path, modules: Sequence[LoraModule], dtype: str,
                   read: "Callable[[str, str], torch.Tensor]", *, base_name: str,
                   all_modules: Iterable[str]) -> None:
    """`write_adapter` with one factor at a time in memory.

    Args:
        modules: what is to be written; the scaling is 1.
        dtype: safetensors name of the dtype of all factors.
        read: `(module, "lora_A" or "lora_B")` -> the factor, in that dtype.
    """
    ranks = {module.name: module.rank for module in sorted(modules)}
    infos = {info.name: (info, module.name, factor)
             for module in modules for factor, info in factor_infos(module, dtype).items()}
    write_safetensors(directory / ADAPTER_WEIGHTS, [infos[key][0] for key in sorted(infos)],
                      lambda key: read(*infos[key][1:]))
    config = peft_config(ranks, shorten(ranks, all_modules), base_name)
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True),
                                            encoding="utf-8")


def factor_infos(module: LoraModule, dtype: str) -> dict[str, TensorInfo]:
    """The two tensors of a module in the adapter file, by factor."""
    shapes = {"lora_A": (module.rank, module.in_features),
              "lora_B": (module.out_features, module.rank)}
    return {factor: TensorInfo(f"{_PREFIX}{module.name}.{factor}.weight", dtype, shape)
            for factor, shape in shapes.items()}


def header_bytes(modules: Iterable[LoraModule], dtype: str) -> int:
    """An upper bound of what the adapter file holds beside the factors, ranks up to those given.

    Lower ranks make shorter numbers; how much shorter is at most some bytes a tensor.
    """
    infos = [info for module in modules for info in factor_infos(module, dtype).values()]
    total = sum(info.num_bytes for info in infos)
    header: dict[str, Any] = {
        info.name: {"dtype": dtype, "shape": list(info.shape), "data_offsets": [total, total]}
        for info in infos}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":"))
    return 8 + len(text.encode()) + 7


def peft_config(ranks: Mapping[str, int], target_modules: list[str],
                base_name: str) -> dict[str, Any]:
    """The content of `adapter_config.json`, from PEFT's own class; alpha is the rank everywhere."""
    from peft import LoraConfig

    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank < largest}
    config = LoraConfig(
        r=largest, lora_alpha=largest, rank_pattern=smaller, alpha_pattern=dict(smaller),
        target_modules=target_modules, bias="none", modules_to_save=None, task_type="CAUSAL_LM",
        base_model_name_or_path=base_name, inference_mode=True).to_dict()
    # PEFT keeps the names as a set, whose order differs from process to process.
    return {**config, "peft_type": "LORA", "target_modules": target_modules}


def shorten(modules: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """Names for `target_modules` by which PEFT hits `modules` and nothing else of `all_modules`.

    The last component alone (`q_proj`) where every module of that name is adapted, because
    engines and readers expect it; the full name otherwise.
    """
    wanted = set(modules)
    missed = {name.rpartition(".")[2] for name in all_modules if name not in wanted}
    return sorted({name if name.rpartition(".")[2] in missed else name.rpartition(".")[2]
                   for name in wanted})


def stored_dtype(name: str) -> "torch.dtype":
    """The torch dtype of one of `STORE_DTYPES`.

    Raises:
        RecipeError: another name.
    """
    return torch_dtype(lookup(STORE_DTYPES, name, "dtype"))
