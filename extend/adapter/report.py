"""What an adapter holds and what it leaves out: `report.json` and the page `report.html`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from extend.adapter.curve import Spectra
from extend.adapter.measured import Measured, read_measured
from extend.adapter.report_page import REPORT_JSON, render_page
from extend.adapter.rounding import merge_dtype, merge_loss
from extend.adapter_format.peft_files import (
    ADAPTER_WEIGHTS,
    Adapter,
    header_bytes,
)
from extend.adapter_format.sidecar import SIDECAR_WEIGHTS, ModuleReport
from extend.checkpoint import DTYPE_BYTES, Checkpoint
from extend.delta.lowrank import Product, product_values
from extend.delta.pair import in_layer_order, layer_of
from extend.delta.parallel import side_by_side
from extend.errors import CheckpointError, CompatibilityError
from extend.inputs import takes_models
from extend.manifest import Manifest
from extend.model_config import read_json
from extend.output import atomic_directory, require_apart, write_json

SCHEMA = 1
REPORT_PAGE = "report.html"
_SPECTRUM_POINTS = 128
_INSIDE_LAYER = re.compile(r".*?\blayers\.\d+\.(?:(?:self_attn|mlp)\.)?")
_NUMBER = re.compile(r"\.\d+(?=\.)")


@takes_models("adapter", "base")
def adapter_report(adapter: Path | str, out: Path | str, *,
                   results: Mapping[str, Path | str] | None = None,
                   base: Path | str | None = None, overwrite: bool = False) -> Path:
    """Write the report of an adapter, with what adapters of several sizes scored.

    `extract` and `cut` leave a report beside every adapter; this one adds evaluations to it, and
    reports on adapters that PEFT trained.

    Args:
        adapter: an adapter directory, ours or PEFT's. PEFT's has no delta to be compared with: all
            shares are then of the adapter itself.
        out: the directory to make: report.html, report.json and the manifest.
        results: label -> results.json or its directory; of models that were merged with an
            adapter, or scored with `eval --adapter`, and of models without one to compare with.
        base: checkpoint to measure what merging loses on, where the adapter's own report does not
            say that.
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        CheckpointError: a file is missing or damaged, or results do not tell their adapter.
        CompatibilityError: not a plain LoRA adapter, or not of this base.
        RecipeError: `out` lies in the adapter.
    """
    require_apart(Path(out), {"adapter": Path(adapter)})
    measured = read_measured(results or {})
    paths = {"adapter": adapter, **({} if base is None else {"base": base}),
             **{f"results.{m.label}": m.path for m in measured}}
    with atomic_directory(out, overwrite=overwrite, inputs=paths) as partial:
        manifest = Manifest("adapter-report", paths, {})
        files = None if base is None else Checkpoint(base)
        _write(partial, describe(Adapter(adapter), files, measured))
        manifest.write(partial)
    return Path(out)


def write_report(directory: Path, base: Checkpoint | None = None) -> None:
    """Write the report of an adapter beside it.

    Args:
        directory: of the adapter.
        base: to measure what merging loses on; without it the report says that this is not known.
    """
    _write(directory, describe(Adapter(directory), base))


def _write(directory: Path, data: Mapping[str, Any]) -> None:

    write_json(directory / REPORT_JSON, data)
    (directory / REPORT_PAGE).write_text(render_page(data), encoding="utf-8")


def describe(adapter: Adapter, base: Checkpoint | None = None,
             measured: Sequence[Measured] = ()) -> dict[str, Any]:
    """The content of report.json.

    Raises:
        CompatibilityError: no linear weight is adapted, or one that the base does not have in its
            shape.
        CheckpointError: a tensor cannot be read.
    """
    if not adapter.modules:
        raise CompatibilityError(f"{adapter.directory}: adapts no linear weight, so there is "
                                 "nothing to report on")
    known = _known_losses(adapter) if base is None else {}

    def measure(name: str) -> tuple[torch.Tensor, float | None]:
        lora_a, lora_b = adapter.read_factors(name)
        scaling = adapter.modules[name].scaling
        product = Product(lora_a, lora_b if scaling == 1 else lora_b * scaling)
        values = _values(adapter, product)
        return values, known.get(name) if base is None else _loss(base, name, product, values)

    names = in_layer_order(adapter.modules)
    measured_modules = dict(zip(names, side_by_side(measure, names), strict=True))
    values = {name: found for name, (found, _) in measured_modules.items()}
    reports = {name: _report_of(adapter, name, found) for name, found in values.items()}
    modules = {name: _describe_module(name, reports[name], found, loss)
               for name, (found, loss) in measured_modules.items()}
    dtype = next(iter(adapter.dtypes)) if len(adapter.dtypes) == 1 else "F32"
    spectra = Spectra(reports, values, DTYPE_BYTES[dtype],
                      header_bytes(adapter.modules.values(), dtype))
    return {"schema": SCHEMA, "adapter": _describe_adapter(adapter),
            "totals": _totals(modules, spectra), "modules": modules, **_others(adapter),
            "curve": spectra.to_json(), "measured": [m.to_json() for m in measured]}


def _values(adapter: Adapter, product: Product) -> torch.Tensor:
    """The singular values; the columns of what `extract` wrote are orthogonal, which saves a QR."""
    if adapter.sidecar is None:
        return product_values(product)
    values = (torch.linalg.vector_norm(product.lora_a, dim=1).double()
              * torch.linalg.vector_norm(product.lora_b, dim=0).double())
    return values.sort(descending=True).values


def _report_of(adapter: Adapter, name: str, values: torch.Tensor) -> ModuleReport:
    """What the sidecar says; without one, the adapter is all there is of the delta."""
    if adapter.sidecar is not None:
        return adapter.sidecar.modules[name]
    module = adapter.modules[name]
    return ModuleReport(shape=(module.out_features, module.in_features), rank=module.rank,
                        delta_norm=float(values.square().sum().sqrt()), relative_norm=None,
                        residual=0.0, energy=1.0)


def _loss(base: Checkpoint, name: str, product: Product, values: torch.Tensor) -> float | None:
    weight, shape = f"{name}.weight", (product.lora_b.shape[0], product.lora_a.shape[1])
    if weight not in base.infos or base.infos[weight].shape != shape:
        found = list(base.infos[weight].shape) if weight in base.infos else "absent"
        raise CompatibilityError(f"{weight} is {list(shape)} in the adapter but {found} in "
                                 f"{base.directory}; give the base that it was made for")
    return merge_loss(base, weight, product, float(values.square().sum().sqrt()),
                      merge_dtype(base, weight))


def _known_losses(adapter: Adapter) -> dict[str, float | None]:
    """What the report beside the adapter says that merging loses."""
    path = adapter.directory / REPORT_JSON
    if not path.is_file():
        return {}
    try:
        return {name: entry["merge_loss"] for name, entry in read_json(path)["modules"].items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: is not a report of an adapter; delete it") from None


def _describe_module(name: str, report: ModuleReport, values: torch.Tensor,
                     loss: float | None) -> dict[str, Any]:
    return {"layer": layer_of(name), "kind": kind_of(name), **report.model_dump(mode="json"),
            "norm": float(values.square().sum().sqrt()), "merge_loss": loss,
            "spectrum": _thin(values)}


def kind_of(name: str) -> str:
    """What modules of all layers (and experts) have in common: `experts.up_proj`."""
    return _NUMBER.sub("", _INSIDE_LAYER.sub("", name))


def _thin(values: torch.Tensor) -> dict[str, list[float]]:
    """Singular values by rank, from 1; at most 128 of them, evenly spaced."""
    count = min(len(values), _SPECTRUM_POINTS)
    ranks = torch.linspace(1, len(values), count, dtype=torch.float64).round().long()
    return {"rank": ranks.tolist(),
            "value": [float(f"{value:.6g}") for value in values[ranks - 1].tolist()]}


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    side = adapter.directory / SIDECAR_WEIGHTS
    sidecar = adapter.sidecar
    return {"base": adapter.config.get("base_model_name_or_path"),
            "tuned": sidecar.sources["tuned"].path if sidecar else None,
            "extraction": sidecar.extraction if sidecar else None,
            "context": [sidecar.rope.max_position_embeddings_before,
                        sidecar.rope.max_position_embeddings_after] if sidecar else None,
            "dtypes": sorted(adapter.dtypes), "rank": adapter.config.get("r"),
            "adapter_bytes": (adapter.directory / ADAPTER_WEIGHTS).stat().st_size,
            "sidecar_bytes": side.stat().st_size if side.is_file() else 0}


def _others(adapter: Adapter) -> dict[str, Any]:
    """What is no linear weight of the adapter file, by name."""
    beside = in_layer_order({*adapter.embeddings, *adapter.biases, *adapter.absolutes})
    if adapter.sidecar is None:
        return {"beside": beside, "tensors": {}, "folded": {}, "left_out": {}, "unchanged": []}
    data = adapter.sidecar.model_dump(mode="json")
    whole = {name: data["tensors"][name] for name in in_layer_order(data["tensors"])}
    return {"beside": beside, "tensors": whole, "folded": data["folded"],
            "left_out": data["left_out"], "unchanged": in_layer_order(data["unchanged"])}


def _totals(modules: Mapping[str, Mapping[str, Any]], spectra: Spectra) -> dict[str, Any]:
    """Over all modules; shares are of their squared norms together."""
    entries = list(modules.values())
    whole, ranks = spectra.at(spectra.counts), [e["rank"] for e in entries]
    return {"modules": len(entries), "ranks": [min(ranks), max(ranks)],
            "mean_rank": whole.mean_rank, "mean_residual": whole.mean_residual,
            "max_residual": max(e["residual"] for e in entries), "energy": whole.energy,
            "noise_share": _weighted(entries, "noise_share", "delta_norm"),
            "merge_loss": _root(_weighted(entries, "merge_loss", "norm", power=2)),
            "relative_norm": _weighted(entries, "relative_norm", None)}


def _weighted(entries: Sequence[Mapping[str, Any]], key: str, norm: str | None,
              power: int = 1) -> float | None:
    """The mean of a value's power, weighted by a squared norm; None where none is known."""
    known = [(e[key], e[norm] ** 2 if norm else 1.0) for e in entries
             if e[key] is not None and (norm is None or e[norm] > 0)]
    total = sum(weight for _, weight in known)
    if not known or total == 0:
        return None
    return sum(value ** power * weight for value, weight in known) / total


def _root(value: float | None) -> float | None:
    return None if value is None else value ** 0.5
