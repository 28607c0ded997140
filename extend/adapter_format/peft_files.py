"""The adapter directory: PEFT's two files, written as PEFT writes them and read without a model.

    adapter_config.json, adapter_model.safetensors      LoRA factors of linear weights
    extend_sidecar.json, extend_sidecar.safetensors     the rest (see `sidecar`)

Written adapters keep to what serving engines accept: linear lora_A and lora_B only, no
`modules_to_save`, alpha equal to rank in every module so that the scaling is 1 even for an engine
that ignores `rank_pattern` and `alpha_pattern`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.adapter_format.peft_keys import (
    ADAPTER_CONFIG,
    PREFIX,
    LoraModule,
    refuse_variants,
    sort_tensors,
)
from extend.adapter_format.sidecar import SIDECAR_WEIGHTS, Sidecar, expert_infos, read_sidecar
from extend.checkpoint import (
    StoredTensor,
    TensorInfo,
    dtype_name,
    read_layout,
    torch_dtype,
    write_safetensors,
)
from extend.errors import CheckpointError
from extend.inputs.names import recorded_name
from extend.model_config import read_json
from extend.registry import lookup

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
STORE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# What PEFT writes for a plain LoRA of linear layers, ready for inference.
_PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": None, "revision": None,
    "inference_mode": True, "lora_dropout": 0.0, "fan_in_fan_out": False, "bias": "none",
    "use_rslora": False, "use_dora": False, "lora_bias": False, "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None, "layers_pattern": None, "layer_replication": None,
    "megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {}}

class TensorFile:
    """One safetensors file whose tensors are read one at a time.

    Raises:
        CheckpointError: missing, truncated or damaged file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.infos, self._begins = read_layout(path)

    def stored(self, name: str) -> StoredTensor:
        """One tensor, to be read in blocks of rows."""
        if name not in self.infos:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}")
        return StoredTensor(self.path, self.infos[name], self._begins[name])

    def read(self, name: str) -> "torch.Tensor":
        """The whole tensor, in its dtype."""
        return self.stored(name).read()


class Adapter:
    """A LoRA adapter in PEFT's format, with its sidecar if it has one.

    Attributes:
        modules: module name (such as `model.layers.0.mlp.up_proj`) -> `LoraModule`.
        dtypes: safetensors names of the dtypes that the tensors are stored in.
        embeddings, biases, absolutes: what other programs write beside these; see
            `AdapterTensors`.
        sidecar: None for an adapter that another program wrote.

    Raises:
        CheckpointError: a file is missing, damaged, or the files do not belong together.
        CompatibilityError: a kind of adapter that is more than W + scaling * B A.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.config = read_json(self.directory / ADAPTER_CONFIG)
        refuse_variants(self.config, self.directory / ADAPTER_CONFIG)
        self._weights = TensorFile(find_weights(self.directory))
        self.dtypes = {info.dtype for info in self._weights.infos.values()}
        self.modules, self.embeddings, self.biases, self.absolutes = sort_tensors(
            self._weights.infos, self.config, self._weights.path)
        if not (self.modules or self.embeddings):
            raise CheckpointError(f"{self._weights.path}: holds no LoRA factors")
        self.sidecar = read_sidecar(self.directory)
        self._side_weights: TensorFile | None = None
        if self.sidecar is not None:
            self._side_weights = TensorFile(self.directory / SIDECAR_WEIGHTS)
            self._check_sidecar(self.sidecar, self._side_weights.infos)

    def _check_sidecar(self, sidecar: Sidecar, infos: Mapping[str, TensorInfo]) -> None:
        found = {name: info.shape for name, info in infos.items()}
        announced = {name: report.shape for name, report in sidecar.tensors.items()}
        announced |= {info.name: info.shape for name, report in sidecar.experts.items()
                      for info in expert_infos(name, report, "F32").values()}
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
        return (self._weights.read(f"{PREFIX}{module}.lora_A.weight").float(),
                self._weights.read(f"{PREFIX}{module}.lora_B.weight").float())

    def read_embedding_factors(self, name: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """`(lora_A [r, tokens], lora_B [hidden, r])` of an embedding's weight in fp32."""
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        return (self._weights.read(f"{module}.lora_embedding_A").float(),
                self._weights.read(f"{module}.lora_embedding_B").float())

    def read_bias(self, name: str) -> "torch.Tensor":
        """The fp32 delta of one of `biases`, [out]."""
        stored = self._weights.read(f"{PREFIX}{name.removesuffix('.bias')}.lora_B.bias")
        return stored.float() * self.biases[name]

    def read_absolute(self, name: str) -> "torch.Tensor":
        """The whole value of one of `absolutes`, in the dtype of the file."""
        return self._weights.read(f"{PREFIX}{name}")

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of `biases` or `absolutes`."""
        key = name if name in self.absolutes else f"{name.removesuffix('.bias')}.lora_B.bias"
        return self._weights.infos[f"{PREFIX}{key}"].shape

    def read_expert_factors(self, name: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """`(lora_A [experts, r, columns], lora_B [experts, rows, r])` in fp32."""
        if self._side_weights is None:
            raise CheckpointError(f"{self.directory}: has no sidecar, so no factors of {name!r}")
        return (self._side_weights.read(f"{name}.lora_A").float(),
                self._side_weights.read(f"{name}.lora_B").float())

    def stored_side_delta(self, name: str) -> StoredTensor:
        """The fp32 delta of a parameter that the sidecar holds, on disk."""
        if self._side_weights is None:
            raise CheckpointError(f"{self.directory}: has no sidecar, so no delta of {name!r}")
        return self._side_weights.stored(name)

    def read_side_delta(self, name: str) -> "torch.Tensor":
        """The fp32 delta of a parameter that the sidecar holds."""
        return self.stored_side_delta(name).read()


def find_weights(directory: Path) -> Path:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise CheckpointError(f"{directory}: holds adapter_model.bin, a pickle, which is not read; "
                              "load it with PEFT and save it as safetensors")
    return path


def write_adapter(directory: Path, factors: "Mapping[str, tuple[torch.Tensor, torch.Tensor]]",
                  *, base_name: Path | str, all_modules: Iterable[str]) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        factors: module -> (lora_A [r, in], lora_B [out, r]), all of one dtype.
        base_name: path or repository of the base, for `base_model_name_or_path`; for a path in the
            Hub's cache the repository and the commit are written.
        all_modules: every module of the base that has a weight; see `shorten`.
    """
    modules = [LoraModule(name, lora_a.shape[0], 1.0, lora_b.shape[0], lora_a.shape[1])
               for name, (lora_a, lora_b) in factors.items()]
    stream_adapter(directory, modules, dtype_name(next(iter(factors.values()))[0].dtype),
                   lambda name, factor: factors[name][factor == "lora_B"],
                   base_name=base_name, all_modules=all_modules)


def stream_adapter(directory: Path, modules: Sequence[LoraModule], dtype: str,
                   read: "Callable[[str, str], torch.Tensor]", *, base_name: Path | str,
                   all_modules: Iterable[str]) -> None:
    """`write_adapter` with one factor at a time in memory.

    Args:
        modules: what is to be written; the scaling is 1.
        dtype: safetensors name of the dtype of all factors.
        read: `(module, "lora_A" or "lora_B")` -> the factor, in that dtype.
    """
    ranks = {module.name: module.rank for module in sorted(modules)}
    stream_factors(directory, modules, dtype, read)
    write_config(directory, peft_config(ranks, shorten(ranks, all_modules), base_name))


def stream_factors(directory: Path, modules: Sequence[LoraModule], dtype: str,
                   read: "Callable[[str, str], torch.Tensor]") -> None:
    """Write `adapter_model.safetensors` alone; arguments as of `stream_adapter`.

    `read` is asked for both factors of a module, lora_A first, before the next module's.
    """
    infos = {info.name: (info, module.name, factor)
             for module in modules for factor, info in factor_infos(module, dtype).items()}
    write_safetensors(directory / ADAPTER_WEIGHTS, [infos[key][0] for key in sorted(infos)],
                      lambda key: read(*infos[key][1:]))


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`."""
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True),
                                            encoding="utf-8")


def factor_infos(module: LoraModule, dtype: str) -> dict[str, TensorInfo]:
    """The two tensors of a module in the adapter file, by factor."""
    shapes = {"lora_A": (module.rank, module.in_features),
              "lora_B": (module.out_features, module.rank)}
    return {factor: TensorInfo(f"{PREFIX}{module.name}.{factor}.weight", dtype, shape)
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
                base_name: Path | str) -> dict[str, Any]:
    """The content of `adapter_config.json`; alpha is the rank everywhere.

    The keys are those that PEFT has written for years and that readers look for. PEFT itself fills
    in the rest, and takes seconds to import, which is why its class is not asked here.
    """
    known = recorded_name(base_name)
    named = {"base_model_name_or_path": str(base_name)} if known is None else {
        "base_model_name_or_path": known.id.repo, "revision": known.id.revision}
    return {**_PLAIN_LORA, **named, "target_modules": target_modules, **rank_fields(ranks)}


def rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The entries of `adapter_config.json` that say ranks, for a scaling of 1 everywhere."""
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank < largest}
    return {"r": largest, "lora_alpha": largest, "rank_pattern": smaller,
            "alpha_pattern": dict(smaller), "use_rslora": False}


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
