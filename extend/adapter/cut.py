"""The stage `cut`: an adapter made smaller, without the two models that it came from."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from extend.adapter.rank import RankRule, ranks_within
from extend.adapter.report import REPORT_PAGE, write_report
from extend.adapter.report_page import REPORT_JSON
from extend.adapter_format.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    STORE_DTYPES,
    Adapter,
    LoraModule,
    header_bytes,
    rank_fields,
    stream_factors,
    write_config,
)
from extend.adapter_format.serving_files import (
    SERVING_JSON,
    SERVING_MD,
    adapter_serving,
    write_serving,
)
from extend.adapter_format.sidecar import SIDECAR_JSON, ModuleReport
from extend.checkpoint import DTYPE_BYTES, torch_dtype
from extend.delta.lowrank import Product, product_values, squared_distance, truncate
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.inputs import takes_models
from extend.manifest import MANIFEST_NAME, Manifest
from extend.model_config import read_json
from extend.output import atomic_directory, copy_or_link, require_apart
from extend.registry import lookup

log = logging.getLogger(__name__)

_WRITTEN_ANEW = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, SIDECAR_JSON, SERVING_JSON, SERVING_MD,
                 MANIFEST_NAME, REPORT_JSON, REPORT_PAGE}


@takes_models("adapter")
def cut(adapter: Path | str, out: Path | str, *, rank: int | None = None,
        energy: float | None = None, adapter_bytes: int | None = None, dtype: str | None = None,
        overwrite: bool = False) -> Path:
    """Write a smaller adapter: of each module the nearest product of a smaller rank.

    Give one of `rank`, `energy` and `adapter_bytes`. From an adapter that `extract` wrote this is
    what an extraction at that rank gives. An adapter that PEFT trained is decomposed first, and its
    scaling goes into the factors. Whatever else the directory holds, the sidecar's deltas above
    all, is carried over.

    Args:
        adapter: an adapter directory, ours or PEFT's.
        out: the adapter directory to make.
        rank: of every module; one of a smaller rank keeps its own.
        energy: in (0, 1]: the fewest ranks per module that hold this fraction of the squared norm
            of what the adapter holds, which may be less than the whole delta.
        adapter_bytes: the largest size of `adapter_model.safetensors`, spent where singular values
            are largest; every module keeps rank 1 at least.
        dtype: of the stored factors: float32, bfloat16 or float16; None keeps the adapter's own.
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        RecipeError: none or several sizes, one out of range, or a rank above every module's.
        CheckpointError: a file is missing or damaged, factors that are not finite or overflow
            their dtype, or `out` cannot be written.
        CompatibilityError: not a plain LoRA adapter, or one that holds more than linear factors.
    """
    rule = RankRule(rank=rank, energy=energy, adapter_bytes=adapter_bytes)
    if rule.name == "noise":
        raise RecipeError("cut: no size is given; give one of rank, bytes and energy")
    require_apart(Path(out), {"adapter": Path(adapter)})
    source = Adapter(adapter)
    _refuse_more(source)
    store = _store_dtype(source, dtype)
    options = {"rule": rule.name, "rank": rank, "energy": energy, "adapter_bytes": adapter_bytes,
               "dtype": dtype}
    with atomic_directory(out, overwrite=overwrite, inputs={"adapter": adapter}) as partial:
        manifest = Manifest("cut", {"adapter": adapter}, options)
        values = {name: _values(source, name) for name in source.modules}
        smaller = _Smaller(source, _choose_ranks(rule, source, values, store), store)
        smaller.write(partial, values, options)
        _write_serving(source, partial)
        write_report(partial)
        summary = smaller.summary((partial / ADAPTER_WEIGHTS).stat().st_size)
        manifest.write(partial, **summary)
    log.info("adapter of %(modules)d modules, %(adapter_bytes)d bytes, rank %(max_rank)d", summary)
    return Path(out)


def _write_serving(source: Adapter, directory: Path) -> None:
    """How to serve the smaller adapter, whose ranks are others, where the larger one says how."""
    if source.sidecar is not None and (source.directory / SERVING_JSON).is_file():
        notes = read_json(source.directory / SERVING_JSON).get("notes", [])
        base = Path(source.sidecar.sources["base"].path)
        write_serving(directory, adapter_serving(directory, tokenizer_dir=base, notes=notes))


def _refuse_more(adapter: Adapter) -> None:
    """An adapter file may hold more than linear factors, and none of it may be lost on the way."""
    more = sorted({*adapter.embeddings, *adapter.biases, *adapter.absolutes})
    if more or not adapter.modules:
        listed = ", ".join(more[:4]) + (f" and {len(more) - 4} more" if len(more) > 4 else "")
        raise CompatibilityError(
            f"{adapter.directory}: holds {listed or 'no linear factors'}, which cut does not take: "
            "only lora_A and lora_B of linear weights; merge the adapter and extract again")


def read_product(adapter: Adapter, module: str) -> Product:
    """The factors of a module, in fp32, with its scaling in lora_B.

    Raises:
        CheckpointError: infinite or NaN values.
    """
    lora_a, lora_b = adapter.read_factors(module)
    lora_b = lora_b * adapter.modules[module].scaling
    if not bool(lora_a.isfinite().all() and lora_b.isfinite().all()):
        raise CheckpointError(f"{adapter.directory}: the factors of {module} hold infinite or NaN "
                              "values; take an adapter from before the training diverged")
    return Product(lora_a, lora_b)


def _values(adapter: Adapter, module: str) -> torch.Tensor:
    return product_values(read_product(adapter, module))


def _store_dtype(adapter: Adapter, dtype: str | None) -> str:
    """The safetensors name of the dtype to write; fp32 for an adapter of several."""
    if dtype is not None:
        return lookup(STORE_DTYPES, dtype, "dtype")
    return next(iter(adapter.dtypes)) if len(adapter.dtypes) == 1 else "F32"


def _choose_ranks(rule: RankRule, adapter: Adapter, values: Mapping[str, torch.Tensor],
                  store: str) -> dict[str, int]:
    """The rank of each module, at least 1."""
    if rule.adapter_bytes is not None:
        shapes = {m.name: (m.out_features, m.in_features) for m in adapter.modules.values()}
        left = rule.adapter_bytes - header_bytes(adapter.modules.values(), store)
        return ranks_within(values, shapes, left, DTYPE_BYTES[store])
    if rule.energy is not None:
        return {name: _rank_reaching(found, rule.energy) for name, found in values.items()}
    largest = max(adapter.modules.values(), key=lambda module: module.rank)
    if rule.rank > largest.rank:
        raise RecipeError(f"rank is {rule.rank}, but {adapter.directory} holds rank {largest.rank} "
                          f"at most ({largest.name}); give a rank of at most that, or extract "
                          "again")
    return {name: min(rule.rank, len(found)) for name, found in values.items()}


def _rank_reaching(values: torch.Tensor, share: float) -> int:
    squares = values.square().cumsum(0)
    return min(len(values), int((squares < share * squares[-1]).sum()) + 1)


class _Smaller:
    """The cut adapter on its way to the disk, one module in memory at a time."""

    def __init__(self, source: Adapter, ranks: Mapping[str, int], store: str):
        self.source, self.ranks, self.store = source, ranks, store
        self.lost: dict[str, float] = {}  # ||before - after||_F^2, by module
        self._module, self._product = "", Product(torch.empty(0), torch.empty(0))

    def write(self, directory: Path, values: Mapping[str, torch.Tensor],
              options: Mapping[str, Any]) -> None:
        modules = [LoraModule(name, self.ranks[name], 1.0, old.out_features, old.in_features)
                   for name, old in self.source.modules.items()]
        stream_factors(directory, modules, self.store, self._read)
        write_config(directory, {**self.source.config, **rank_fields(self.ranks)})
        for file in sorted(self.source.directory.iterdir()):
            if file.is_file() and file.name not in _WRITTEN_ANEW:
                copy_or_link(file, directory / file.name)
        sidecar = self.source.sidecar
        if sidecar is not None:
            reports = {name: self._report(name, report, values[name])
                       for name, report in sidecar.modules.items()}
            extraction = {**sidecar.extraction, "cut": dict(options)}
            sidecar.model_copy(update={"modules": reports, "extraction": extraction}
                               ).write(directory)

    def _read(self, module: str, factor: str) -> torch.Tensor:
        if module != self._module:
            self._module, self._product = module, self._truncate(module)
        return self._product.lora_a if factor == "lora_A" else self._product.lora_b

    def _truncate(self, module: str) -> Product:
        whole = read_product(self.source, module)
        dtype = torch_dtype(self.store)
        stored = Product(*(factor.to(dtype) for factor in truncate(whole, self.ranks[module])))
        if not bool(stored.lora_a.isfinite().all() and stored.lora_b.isfinite().all()):
            raise CheckpointError(f"the factors of {module} overflow {dtype}; give --dtype bf16 or "
                                  "fp32")
        self.lost[module] = squared_distance(whole, stored)
        return stored

    def _report(self, module: str, report: ModuleReport, values: torch.Tensor) -> ModuleReport:
        """The report after the cut.

        What an extraction kept is the projection of the delta onto singular vectors, so what it
        left out and what is lost now are orthogonal, and their squares add up.
        """
        rank = self.ranks[module]
        residual = (report.residual ** 2 + self.lost[module] / report.delta_norm ** 2) ** 0.5
        energy = float(values[:rank].square().sum()) / report.delta_norm ** 2
        return report.model_copy(update={"rank": rank, "residual": residual,
                                         "energy": min(1.0, energy)})

    def summary(self, adapter_bytes: int) -> dict[str, Any]:
        """The results of the manifest."""
        return {"modules": len(self.ranks), "adapter_bytes": adapter_bytes,
                "max_rank": max(self.ranks.values())}
