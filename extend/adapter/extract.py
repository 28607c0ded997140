"""The stage `extract`: long model minus base model -> LoRA adapter and sidecar."""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from extend.adapter.delta import (
    ModelPair,
    frobenius,
    in_layer_order,
    is_linear,
    is_vocabulary,
    layer_of,
    open_pair,
    read_delta,
    residual_norm,
)
from extend.adapter.svd import Factors, factorize_to_energy, factorize_to_rank, tensor_generator
from extend.adapter_format.peft_files import ADAPTER_WEIGHTS, stored_dtype, write_adapter
from extend.adapter_format.sidecar import (
    SIDECAR_WEIGHTS,
    ModuleReport,
    RopeChange,
    Sidecar,
    Source,
    TensorReport,
)
from extend.checkpoint import TensorInfo, write_safetensors
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.manifest import Manifest
from extend.output import atomic_directory

log = logging.getLogger(__name__)

DEFAULT_RANK = 32


def extract(base: Path | str, tuned: Path | str, out: Path | str, *, rank: int | None = None,
            energy: float | None = None, embeddings: bool = True, dtype: str = "float32",
            seed: int = 0, device: str = "auto", overwrite: bool = False) -> Path:
    """Write the difference of two checkpoints as a LoRA adapter with a sidecar.

    Args:
        base: checkpoint directory of the short model.
        tuned: checkpoint directory of the long model; same parameters as `base`.
        out: the adapter directory to make.
        rank: of every module, capped at each matrix's own size; 32 when `energy` is not given.
        energy: in (0, 1], instead of `rank`: the fewest ranks per module that hold this fraction
            of ||delta||_F^2. On a delta near the rounding of bf16 weights this chases noise.
        embeddings: False leaves the deltas of the embedding and the head out and records their
            norms; the merged model then differs from the long one by them.
        dtype: of the stored factors: float32, bfloat16 or float16. The sidecar is always fp32.
        seed: of the random sketches.
        device: cpu, cuda, or auto (cuda where there is one).
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        RecipeError: an option out of range, or a rank larger than every matrix.
        CompatibilityError: the checkpoints do not fit together, or no linear weight differs.
        CheckpointError: a file is missing or damaged, or `out` cannot be written.
    """
    _check_options(rank, energy)
    options = {"rank": rank if energy is not None else rank or DEFAULT_RANK, "energy": energy,
               "embeddings": embeddings, "dtype": dtype}
    store, device = stored_dtype(dtype), _pick_device(device)
    pair = open_pair(base, tuned)
    linear = in_layer_order(name for name, info in pair.infos.items() if is_linear(info))
    _check_rank(options["rank"], pair, linear)
    factorize = _factorizer(options["rank"], energy, seed)
    with atomic_directory(out, overwrite=overwrite) as partial:
        manifest = Manifest("extract", {"base": base, "tuned": tuned}, options, seed)
        found = _Extraction(pair, device, store, embeddings)
        found.take_linear(linear, factorize)
        found.take_rest(in_layer_order(set(pair.infos) - set(linear)))
        found.write(partial, base_name=str(base))
        _describe(found, manifest.record, {**options, "seed": seed}).write(partial)
        summary = found.summary((partial / ADAPTER_WEIGHTS).stat().st_size)
        manifest.write(partial, **summary)
    log.info("adapter of %(modules)d modules, %(adapter_bytes)d bytes, mean residual "
             "%(mean_residual).4f, largest %(max_residual).4f", summary)
    return Path(out)


def _check_options(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise RecipeError(f"rank is {rank} and energy is {energy}; give one of them")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RecipeError(f"rank is {rank!r}; give a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"energy is {energy!r}; give a fraction in (0, 1], such as 0.95")


def _pick_device(device: str) -> str:
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise RecipeError(f"device: unknown {device!r}; choose one of auto, cpu, cuda")
    if device.startswith("cuda") and not available:
        raise RecipeError(f"device is {device!r} but torch sees no CUDA device; choose cpu or auto")
    return device


def _check_rank(rank: int | None, pair: ModelPair, linear: list[str]) -> None:
    if not linear:
        raise CompatibilityError(f"{pair.base.directory}: holds no linear weight of a decoder "
                                 "layer; only decoder models in Hugging Face format are supported")
    largest = max(linear, key=lambda name: min(pair.infos[name].shape))
    limit = min(pair.infos[largest].shape)
    if rank is not None and rank > limit:
        raise RecipeError(f"rank is {rank}, larger than every matrix: the largest is {largest} "
                          f"{list(pair.infos[largest].shape)}; give a rank of at most {limit}")


def _factorizer(rank: int | None, energy: float | None,
                seed: int) -> Callable[[str, torch.Tensor], Factors]:
    def factorize(name: str, delta: torch.Tensor) -> Factors:
        generator = tensor_generator(name, seed)
        if energy is not None:
            return factorize_to_energy(delta, energy, generator)
        return factorize_to_rank(delta, rank, generator)
    return factorize


@dataclass
class _Extraction:
    """What has been taken from the pair so far; factors are kept on the CPU, deltas are not."""

    pair: ModelPair
    device: str
    store: torch.dtype
    embeddings: bool
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    modules: dict[str, ModuleReport] = field(default_factory=dict)
    tensors: dict[str, TensorReport] = field(default_factory=dict)
    left_out: dict[str, TensorReport] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)

    def take_linear(self, names: list[str],
                    factorize: Callable[[str, torch.Tensor], Factors]) -> None:
        """Factorize the delta of every linear weight, layer by layer."""
        num_layers = self.pair.base_config.num_layers
        for layer, group in itertools.groupby(names, key=layer_of):
            reports = [r for name in group if (r := self._take_one(name, factorize)) is not None]
            if reports:
                log.info("layer %d of %d: %d modules, rank %d, residual %.4f, |delta| / |W| %.2e",
                         layer + 1, num_layers, len(reports), max(r.rank for r in reports),
                         _mean([r.residual for r in reports]),
                         _mean([r.relative_norm or 0.0 for r in reports]))
        if not self.factors:
            raise CompatibilityError(
                f"no linear weight of {self.pair.tuned.directory} differs from "
                f"{self.pair.base.directory}; an adapter would hold nothing, so give the trained "
                "checkpoint (for a change of RoPE alone, rescale the target)")

    def _take_one(self, name: str,
                  factorize: Callable[[str, torch.Tensor], Factors]) -> ModuleReport | None:
        delta, base_norm = read_delta(self.pair, name, self.device)
        delta_norm = frobenius(delta)
        if delta_norm == 0:
            self.unchanged.append(name)
            return None
        found = factorize(name, delta)
        lora_a, lora_b = found.lora_a.to(self.store), found.lora_b.to(self.store)
        residual = residual_norm(delta, lora_a, lora_b) / delta_norm
        if not math.isfinite(residual):
            raise CheckpointError(
                f"the factors of {name} overflow {self.store} (||delta||_F is {delta_norm:.3e}); "
                "give --dtype bf16 or fp32")
        module = name.removesuffix(".weight")
        self.factors[module] = (lora_a.cpu(), lora_b.cpu())
        self.modules[module] = ModuleReport(
            shape=tuple(delta.shape), rank=lora_a.shape[0], residual=residual, energy=found.energy,
            delta_norm=delta_norm, relative_norm=_ratio(delta_norm, base_norm))
        return self.modules[module]

    def take_rest(self, names: list[str]) -> None:
        """Measure the delta of everything else; `write` reads the non-zero ones again."""
        for name in names:
            delta, base_norm = read_delta(self.pair, name, self.device)
            delta_norm = frobenius(delta)
            report = TensorReport(shape=tuple(delta.shape), delta_norm=delta_norm,
                                  relative_norm=_ratio(delta_norm, base_norm))
            if delta_norm == 0:
                self.unchanged.append(name)
            elif is_vocabulary(name) and not self.embeddings:
                log.warning("%s: a delta of norm %.4e (|delta| / |W| %.2e) is left out of the "
                            "sidecar", name, delta_norm, report.relative_norm)
                self.left_out[name] = report
            else:
                self.tensors[name] = report

    def write(self, directory: Path, *, base_name: str) -> None:
        """Write PEFT's two files and the sidecar's deltas."""
        all_modules = [name.removesuffix(".weight") for name in self.pair.infos]
        write_adapter(directory, self.factors, base_name=base_name, all_modules=all_modules)
        infos = [TensorInfo(name, "F32", self.tensors[name].shape) for name in sorted(self.tensors)]
        write_safetensors(directory / SIDECAR_WEIGHTS, infos,
                          lambda name: read_delta(self.pair, name)[0])

    def summary(self, adapter_bytes: int) -> dict[str, Any]:
        residuals = [report.residual for report in self.modules.values()]
        return {"modules": len(self.modules), "adapter_bytes": adapter_bytes,
                "max_rank": max(report.rank for report in self.modules.values()),
                "mean_residual": _mean(residuals), "max_residual": max(residuals),
                "sidecar_tensors": len(self.tensors), "left_out": sorted(self.left_out),
                "unchanged": len(self.unchanged)}


def _describe(found: _Extraction, record: dict[str, Any], options: dict[str, Any]) -> Sidecar:
    pair = found.pair
    return Sidecar(rope=RopeChange.between(pair.base_config, pair.tuned_config),
                   base=pair.identity, extraction=options, modules=found.modules,
                   sources={role: Source(**entry) for role, entry in record["inputs"].items()},
                   tensors=found.tensors, left_out=found.left_out,
                   unchanged=sorted(found.unchanged))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _ratio(delta_norm: float, base_norm: float) -> float | None:
    """||delta|| / ||base||; None for a base of zeros, such as a fresh bias."""
    return delta_norm / base_norm if base_norm else None
