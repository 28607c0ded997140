"""The work of one extraction: each delta once, its factors to disk, then all of them into files."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from extend.adapter.parts import Parts
from extend.adapter.rank import RankRule, even_rank, ranks_within
from extend.adapter.workers import Workers
from extend.adapter_format.peft_files import LoraModule, header_bytes, stream_adapter
from extend.adapter_format.sidecar import (
    SIDECAR_WEIGHTS,
    ExpertsReport,
    ModuleReport,
    RopeChange,
    Sidecar,
    Source,
    TensorReport,
    expert_infos,
)
from extend.checkpoint import TensorInfo, dtype_name, write_safetensors
from extend.console import progress
from extend.delta.pair import (
    Difference,
    ModelPair,
    Stored,
    delta_blocks,
    is_unchanged,
    is_vocabulary,
    layer_of,
    open_stored,
    residual_norm,
    subtract,
)
from extend.errors import CheckpointError, CompatibilityError

log = logging.getLogger(__name__)

_UNCHANGED: dict[str, Any] = {}  # the report of a parameter whose delta is zero


class Matrix(NamedTuple):
    """What is decomposed at once: a parameter, or one expert's part of it.

    Attributes:
        name: of the parameter.
        expert: its number where the parameter holds all experts of a layer.
        at_rank: how far a byte budget looks.
    """

    name: str
    expert: int | None = None
    at_rank: int = 1

    @property
    def key(self) -> str:
        """Names its part, and the random numbers of its sketch."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


@dataclass
class Extraction:
    """What has been taken from the pair so far: reports here, factors in `parts`."""

    pair: ModelPair
    workers: Workers
    store: torch.dtype
    embeddings: bool
    rule: RankRule
    parts: Parts
    modules: dict[str, ModuleReport] = field(default_factory=dict)
    experts: dict[str, ExpertsReport] = field(default_factory=dict)
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
        first = self._first_rank(names)
        done = self._factorize_all([Matrix(name, at_rank=first) for name in names])
        for layer, group in itertools.groupby(done, key=lambda pair: layer_of(pair[0].name)):
            reports = [r for matrix, report in group
                       if (r := self._take_one(matrix.name, report)) is not None]
            if reports:
                log.info("layer %d of %d: %d modules, rank %d, residual %.4f, |delta| / |W| %.2e",
                         layer + 1, self.pair.base_config.num_layers, len(reports),
                         max(r.rank for r in reports), _mean([r.residual for r in reports]),
                         _mean([r.relative_norm or 0.0 for r in reports]),
                         extra=progress(layer + 1, self.pair.base_config.num_layers))
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

    def _factorize_all(self, matrices: list[Matrix]) -> Iterator[tuple[Matrix, dict[str, Any]]]:
        """Each matrix with what its part reports, in order; those with a part are not read."""
        found = {matrix.key: report for matrix in matrices
                 if (report := self.parts.report(matrix.key)) is not None}
        if found:
            log.info("going on after an interruption: %d of %d matrices are done", len(found),
                     len(matrices))
        made = self._work([m for m in matrices if m.key not in found], self._factorize)
        for matrix in matrices:
            yield matrix, found[matrix.key] if matrix.key in found else next(made)

    def _work(self, matrices: list[Matrix], work: Callable[[Matrix, Difference], Any]) -> Iterator:
        """`work(matrix, its difference on a device)`, in order."""
        def read(matrix: Matrix) -> Stored:
            return open_stored(self.pair, matrix.name, matrix.expert, pin=self.workers.pinned)

        return self.workers.run(
            matrices, read,
            lambda m, stored, device: work(m, subtract(self.pair, m.name, stored, device)))

    def _take_one(self, name: str, report: dict[str, Any]) -> ModuleReport | None:
        if report == _UNCHANGED:
            self.unchanged.append(name)
            return None
        self.modules[_module(name)] = ModuleReport.model_validate(report)
        return self.modules[_module(name)]

    def _factorize(self, matrix: Matrix, found: Difference) -> dict[str, Any]:
        """Decompose one delta into its part, and return what the part reports."""
        if found.delta_norm == 0:
            self.parts.write(matrix.key, _UNCHANGED, {})
            return _UNCHANGED
        factors = self.rule.factorize(matrix.key, found.delta, found.noise,
                                      self.pair.tuned.infos[matrix.name].dtype, matrix.at_rank)
        lora_a, lora_b = factors.lora_a.to(self.store), factors.lora_b.to(self.store)
        # Unrounded factors are a projection of the delta, onto as much as their values say.
        cross = None if self.store.itemsize < 4 else float(factors.values.double().square().sum())
        report = self._report(matrix.key, found, lora_a, lora_b, factors.energy, cross)
        self.parts.write(matrix.key, report,
                         {"lora_A": lora_a, "lora_B": lora_b, "values": factors.values})
        return report

    def _report(self, key: str, found: Difference, lora_a: torch.Tensor, lora_b: torch.Tensor,
                energy: float, cross: float | None = None) -> dict[str, Any]:
        residual = residual_norm(found.delta, lora_a, lora_b, total=found.delta_norm ** 2,
                                 cross=cross) / found.delta_norm
        if not math.isfinite(residual):
            raise CheckpointError(
                f"the factors of {key} overflow {self.store} (||delta||_F is "
                f"{found.delta_norm:.3e}); give --dtype bf16 or fp32")
        return ModuleReport(
            shape=tuple(found.delta.shape), rank=lora_a.shape[0], residual=residual, energy=energy,
            delta_norm=found.delta_norm, relative_norm=_ratio(found.delta_norm, found.base_norm),
            noise_edge=found.noise.edge, noise_share=found.noise.energy / found.delta_norm ** 2,
        ).model_dump(mode="json")

    def _keep_to_budget(self, num_bytes: int) -> None:
        """Cut all modules at one singular value; look further where a module ends above it."""
        shapes = {module: report.shape for module, report in self.modules.items()}
        largest = [LoraModule(module, min(shape), 1.0, *shape) for module, shape in shapes.items()]
        left = num_bytes - header_bytes(largest, dtype_name(self.store))
        while True:
            values = {module: self.parts.read(_weight(module), "values") for module in shapes}
            ranks = ranks_within(values, shapes, left, self.store.itemsize)
            short = [Matrix(_weight(module), at_rank=2 * rank) for module, rank in ranks.items()
                     if rank == len(values[module]) < min(shapes[module])]
            if not short:
                break
            for _ in self._work(short, self._factorize):
                pass

        def cut(matrix: Matrix, found: Difference) -> dict[str, Any]:
            module = _module(matrix.name)
            squares = values[module].double().square()[:ranks[module]].sum()
            lora_a, lora_b = (
                self._read_factor(matrix, factor, ranks[module]).to(found.delta.device)
                for factor in ("lora_A", "lora_B"))
            return self._report(matrix.name, found, lora_a, lora_b,
                                min(1.0, float(squares) / found.delta_norm ** 2))

        for module, report in zip(ranks, self._work([Matrix(_weight(m)) for m in ranks], cut)):
            self.modules[module] = ModuleReport.model_validate(report)

    def _read_factor(self, matrix: Matrix, factor: str, rank: int) -> torch.Tensor:
        """A factor cut to `rank`, or filled up with zeros to it."""
        whole = self.parts.read(matrix.key, factor)
        if whole.shape[factor == "lora_B"] < rank:
            missing = rank - whole.shape[factor == "lora_B"]
            size = (0, missing) if factor == "lora_B" else (0, 0, 0, missing)
            return torch.nn.functional.pad(whole, size)
        return whole[:rank] if factor == "lora_A" else whole[:, :rank]

    def take_experts(self, names: list[str], like: list[str]) -> None:
        """Factorize every expert of parameters that hold all experts of a layer.

        Args:
            like: the linear weights; a byte budget, which is not for experts, gives these the rank
                that it affords every one of those.

        Raises:
            CheckpointError: infinite or NaN values, or factors that overflow their dtype.
        """
        rank = max(1, self._first_rank(like) // 2)
        done = self._factorize_all([Matrix(name, expert, rank) for name in names
                                    for expert in range(self.pair.infos[name].shape[0])])
        for name, group in itertools.groupby(done, key=lambda pair: pair[0].name):
            reports = [None if report == _UNCHANGED else ModuleReport.model_validate(report)
                       for _, report in group]
            found = [report for report in reports if report is not None]
            if not found:
                self.unchanged.append(name)
                continue
            self.experts[name] = ExpertsReport.of(reports)
            log.info("%s: %d experts, rank %d, residual %.4f", name, len(reports),
                     self.experts[name].rank, self.experts[name].residual)

    def take_rest(self, names: list[str]) -> None:
        """Measure the delta of everything else; `write_sidecar` reads the non-zero ones again.

        Raises:
            CheckpointError: infinite or NaN values.
        """
        for name in names:
            if is_unchanged(self.pair, name):
                self.unchanged.append(name)
                continue
            delta_norm, base_norm = self._measure(name)
            report = TensorReport(shape=self.pair.infos[name].shape, delta_norm=delta_norm,
                                  relative_norm=_ratio(delta_norm, base_norm))
            if delta_norm == 0:
                self.unchanged.append(name)
            elif is_vocabulary(name) and not self.embeddings:
                log.warning("%s: a delta of norm %.4e (|delta| / |W| %.2e) is left out of the "
                            "sidecar", name, delta_norm, report.relative_norm)
                self.left_out[name] = report
            else:
                self.tensors[name] = report

    def _measure(self, name: str) -> tuple[float, float]:
        norms = [block[1:] for block in delta_blocks(self.pair, name)]
        return tuple(math.fsum(x * x for x in column) ** 0.5 for column in zip(*norms))

    def write_sidecar(self, directory: Path) -> None:
        """Write the deltas and the experts' factors that the sidecar holds, block by block."""
        factors = {info.name: (name, factor, info) for name, report in self.experts.items()
                   for factor, info in expert_infos(name, report, dtype_name(self.store)).items()}
        infos = [*(TensorInfo(name, "F32", self.tensors[name].shape) for name in self.tensors),
                 *(info for _, _, info in factors.values())]

        def read(name: str) -> Iterator[torch.Tensor]:
            if name not in factors:
                return (block for block, _, _ in delta_blocks(self.pair, name))
            parameter, factor, info = factors[name]
            rank = self.experts[parameter].rank
            return (self._expert_factor(Matrix(parameter, expert), factor, rank)[None]
                    for expert in range(info.shape[0]))

        write_safetensors(directory / SIDECAR_WEIGHTS, sorted(infos), read)

    def _expert_factor(self, matrix: Matrix, factor: str, rank: int) -> torch.Tensor:
        """Zeros for an expert that did not change."""
        if self.parts.report(matrix.key) != _UNCHANGED:
            return self._read_factor(matrix, factor, rank)
        rows, columns = self.pair.infos[matrix.name].shape[1:]
        size = (rank, columns) if factor == "lora_A" else (rows, rank)
        return torch.zeros(size, dtype=self.store)

    def write_adapter(self, directory: Path, *, base_name: Path | str) -> None:
        """Write PEFT's two files, one factor at a time."""
        modules = [LoraModule(module, report.rank, 1.0, *report.shape)
                   for module, report in self.modules.items()]
        stream_adapter(
            directory, modules, dtype_name(self.store),
            lambda module, factor: self._read_factor(Matrix(_weight(module)), factor,
                                                     self.modules[module].rank),
            base_name=base_name, all_modules=[_module(name) for name in self.pair.infos])

    def summary(self, adapter_bytes: int) -> dict[str, Any]:
        """The results of the manifest."""
        residuals = [report.residual for report in self.modules.values()]
        return {"modules": len(self.modules), "adapter_bytes": adapter_bytes,
                "max_rank": max(report.rank for report in self.modules.values()),
                "mean_residual": _mean(residuals), "max_residual": max(residuals),
                "sidecar_tensors": len(self.tensors), "sidecar_experts": len(self.experts),
                "left_out": sorted(self.left_out),
                "unchanged": len(self.unchanged)}

    def describe(self, record: dict[str, Any], options: dict[str, Any]) -> Sidecar:
        """The sidecar of what was taken, from the manifest's record and the stage's options."""
        pair = self.pair
        return Sidecar(rope=RopeChange.between(pair.base_config, pair.tuned_config),
                       base=pair.identity, extraction=options, modules=self.modules,
                       sources={role: Source(path=entry["path"], sha256=entry["sha256"])
                                for role, entry in record["inputs"].items()},
                       tensors=self.tensors, experts=self.experts, left_out=self.left_out,
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
