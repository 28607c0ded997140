"""The work of one extraction: each delta once, its factors to disk, then all of them into files."""

import itertools
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from extend.adapter.parts import Parts
from extend.adapter.rank import RankRule, even_rank, ranks_within
from extend.adapter_format.peft_files import LoraModule, header_bytes, stream_adapter
from extend.adapter_format.sidecar import (
    SIDECAR_WEIGHTS,
    ModuleReport,
    RopeChange,
    Sidecar,
    Source,
    TensorReport,
)
from extend.checkpoint import TensorInfo, dtype_name, write_safetensors
from extend.delta.noise import Noise
from extend.delta.pair import (
    ModelPair,
    frobenius,
    is_vocabulary,
    layer_of,
    read_delta,
    read_linear_delta,
    residual_norm,
)
from extend.errors import CheckpointError, CompatibilityError

log = logging.getLogger(__name__)

_UNCHANGED: dict[str, Any] = {}  # the report of a parameter whose delta is zero


@dataclass
class Extraction:
    """What has been taken from the pair so far: reports here, factors in `parts`."""

    pair: ModelPair
    device: str
    store: torch.dtype
    embeddings: bool
    rule: RankRule
    parts: Parts
    modules: dict[str, ModuleReport] = field(default_factory=dict)
    tensors: dict[str, TensorReport] = field(default_factory=dict)
    left_out: dict[str, TensorReport] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)

    def take_linear(self, names: list[str]) -> None:
        """Factorize the delta of every linear weight, layer by layer; then keep to the budget.

        Raises:
            CheckpointError: infinite or NaN values, or factors that overflow their dtype.
            CompatibilityError: no linear weight differs.
            RecipeError: the budget does not hold rank 1.
        """
        if self.parts.found:
            log.info("going on after an interruption: %d of %d linear weights are done",
                     self.parts.found, len(names))
        first = self._first_rank(names)
        for layer, group in itertools.groupby(names, key=layer_of):
            reports = [r for name in group if (r := self._take_one(name, first)) is not None]
            if reports:
                log.info("layer %d of %d: %d modules, rank %d, residual %.4f, |delta| / |W| %.2e",
                         layer + 1, self.pair.base_config.num_layers, len(reports),
                         max(r.rank for r in reports), _mean([r.residual for r in reports]),
                         _mean([r.relative_norm or 0.0 for r in reports]))
        if not self.modules:
            raise CompatibilityError(
                f"no linear weight of {self.pair.tuned.directory} differs from "
                f"{self.pair.base.directory}; an adapter would hold nothing, so give the trained "
                "checkpoint (for a change of RoPE alone, rescale the target)")
        if self.rule.adapter_bytes is not None:
            self._keep_to_budget(self.rule.adapter_bytes)

    def _first_rank(self, names: list[str]) -> int:
        """How far a byte budget looks at first: twice the rank that it affords everywhere."""
        if self.rule.adapter_bytes is None:
            return 1
        return 2 * even_rank([self.pair.infos[name].shape for name in names],
                             self.rule.adapter_bytes, self.store.itemsize)

    def _take_one(self, name: str, at_rank: int) -> ModuleReport | None:
        report = self.parts.report(name)
        if report is None:
            report = self._factorize(name, at_rank)
        if report == _UNCHANGED:
            self.unchanged.append(name)
            return None
        self.modules[_module(name)] = ModuleReport.model_validate(report)
        return self.modules[_module(name)]

    def _factorize(self, name: str, at_rank: int) -> dict[str, Any]:
        """Decompose one delta into its part, and return what the part reports."""
        delta, base_norm, noise = read_linear_delta(self.pair, name, self.device)
        delta_norm = frobenius(delta)
        if delta_norm == 0:
            self.parts.write(name, _UNCHANGED, {})
            return _UNCHANGED
        found = self.rule.factorize(name, delta, noise, self.pair.tuned.infos[name].dtype, at_rank)
        lora_a, lora_b = found.lora_a.to(self.store), found.lora_b.to(self.store)
        report = self._report(name, delta, lora_a, lora_b, found.energy, noise, base_norm)
        self.parts.write(name, report, {"lora_A": lora_a, "lora_B": lora_b, "values": found.values})
        return report

    def _report(self, name: str, delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor,
                energy: float, noise: Noise, base_norm: float) -> dict[str, Any]:
        delta_norm = frobenius(delta)
        residual = residual_norm(delta, lora_a, lora_b) / delta_norm
        if not math.isfinite(residual):
            raise CheckpointError(
                f"the factors of {name} overflow {self.store} (||delta||_F is {delta_norm:.3e}); "
                "give --dtype bf16 or fp32")
        return ModuleReport(
            shape=tuple(delta.shape), rank=lora_a.shape[0], residual=residual, energy=energy,
            delta_norm=delta_norm, relative_norm=_ratio(delta_norm, base_norm),
            noise_edge=noise.edge, noise_share=noise.energy / delta_norm ** 2,
        ).model_dump(mode="json")

    def _keep_to_budget(self, num_bytes: int) -> None:
        """Cut all modules at one singular value; look further where a module ends above it."""
        shapes = {module: report.shape for module, report in self.modules.items()}
        largest = [LoraModule(module, min(shape), 1.0, *shape) for module, shape in shapes.items()]
        left = num_bytes - header_bytes(largest, dtype_name(self.store))
        while True:
            values = {module: self.parts.read(_weight(module), "values") for module in shapes}
            ranks = ranks_within(values, shapes, left, self.store.itemsize)
            short = [module for module, rank in ranks.items()
                     if rank == len(values[module]) < min(shapes[module])]
            if not short:
                break
            for module in short:
                self._factorize(_weight(module), 2 * ranks[module])
        for module, rank in ranks.items():
            self._cut(module, rank, values[module])

    def _cut(self, module: str, rank: int, values: torch.Tensor) -> None:
        """Report on the leading ranks of a part; the part itself stays as it is."""
        delta, base_norm, noise = read_linear_delta(self.pair, _weight(module), self.device)
        squares = values.double().square()[:rank].sum()
        energy = min(1.0, float(squares) / frobenius(delta) ** 2)
        lora_a, lora_b = (self._read_factor(module, factor, rank).to(self.device)
                          for factor in ("lora_A", "lora_B"))
        self.modules[module] = ModuleReport.model_validate(
            self._report(_weight(module), delta, lora_a, lora_b, energy, noise, base_norm))

    def _read_factor(self, module: str, factor: str, rank: int) -> torch.Tensor:
        whole = self.parts.read(_weight(module), factor)
        return whole[:rank] if factor == "lora_A" else whole[:, :rank]

    def take_rest(self, names: list[str]) -> None:
        """Measure the delta of everything else; `write` reads the non-zero ones again.

        Raises:
            CheckpointError: infinite or NaN values.
        """
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
        """Write PEFT's two files and the sidecar's deltas, one tensor at a time."""
        modules = [LoraModule(module, report.rank, 1.0, *report.shape)
                   for module, report in self.modules.items()]
        stream_adapter(
            directory, modules, dtype_name(self.store),
            lambda module, factor: self._read_factor(module, factor, self.modules[module].rank),
            base_name=base_name, all_modules=[_module(name) for name in self.pair.infos])
        infos = [TensorInfo(name, "F32", self.tensors[name].shape) for name in sorted(self.tensors)]
        write_safetensors(directory / SIDECAR_WEIGHTS, infos,
                          lambda name: read_delta(self.pair, name)[0])

    def summary(self, adapter_bytes: int) -> dict[str, Any]:
        """The results of the manifest."""
        residuals = [report.residual for report in self.modules.values()]
        return {"modules": len(self.modules), "adapter_bytes": adapter_bytes,
                "max_rank": max(report.rank for report in self.modules.values()),
                "mean_residual": _mean(residuals), "max_residual": max(residuals),
                "sidecar_tensors": len(self.tensors), "left_out": sorted(self.left_out),
                "unchanged": len(self.unchanged)}

    def describe(self, record: dict[str, Any], options: dict[str, Any]) -> Sidecar:
        """The sidecar of what was taken, from the manifest's record and the stage's options."""
        pair = self.pair
        return Sidecar(rope=RopeChange.between(pair.base_config, pair.tuned_config),
                       base=pair.identity, extraction=options, modules=self.modules,
                       sources={role: Source(**entry) for role, entry in record["inputs"].items()},
                       tensors=self.tensors, left_out=self.left_out,
                       unchanged=sorted(self.unchanged))


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _weight(module: str) -> str:
    return f"{module}.weight"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _ratio(delta_norm: float, base_norm: float) -> float | None:
    """||delta|| / ||base||; None for a base of zeros, such as a fresh bias."""
    return delta_norm / base_norm if base_norm else None
