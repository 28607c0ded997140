"""Rewrite an adapter so that every engine serves it: one rank, scaling 1, no gaps in stacks.

Factors are filled with zeros up to the largest rank, the scaling goes into lora_B, and where an
engine stacks weights (q, k and v; gate and up; the experts of a layer) the missing ones are added
as zeros. B A stays what it was; only the file grows.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from extend.adapter_format.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    LoraModule,
    stream_adapter,
)
from extend.adapter_format.serving_files import SERVING_JSON, SERVING_MD
from extend.adapter_format.sidecar import SIDECAR_JSON, ModuleReport, Sidecar
from extend.checkpoint import torch_dtype
from extend.errors import CheckpointError, CompatibilityError
from extend.manifest import MANIFEST_NAME, Manifest
from extend.output import atomic_directory, overlap

_STACK = re.compile(r"(.+)\.(q_proj|k_proj|v_proj|gate_proj|up_proj)")
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.\w+")
_REWRITTEN = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, SIDECAR_JSON, SERVING_JSON, SERVING_MD,
              MANIFEST_NAME, "added_tokens.json")


def write_servable(directory: Path | str, out: Path | str, *, overwrite: bool = False) -> Path:
    """Write the adapter to `out` in the form above; return `out`.

    Raises:
        CompatibilityError: more than W + scaling * B A, or a stack with gaps whose shapes nothing
            tells.
        CheckpointError: a file is missing or damaged, or `out` cannot be written.
    """
    lora, out = Adapter(directory), Path(out)
    if overlap(lora.directory, out):
        raise CheckpointError(f"out {out} and {directory} lie in one another; choose an out of its "
                              "own")
    _refuse_rest(lora)
    rank = max(module.rank for module in lora.modules.values())
    added = dict(_missing(lora, rank))
    modules = [module._replace(rank=rank, scaling=1.0) for module in lora.modules.values()]
    with atomic_directory(out, overwrite=overwrite, inputs={"adapter": directory}) as partial:
        manifest = Manifest("doctor", {"adapter": directory}, {"fix": True})
        for path in sorted(lora.directory.iterdir()):
            if path.is_file() and path.name not in _REWRITTEN:
                shutil.copyfile(path, partial / path.name)
        # A scaling other than 1 gives products that the stored dtype need not hold.
        plain = all(module.scaling == 1 for module in lora.modules.values())
        dtype = lora.dtype if plain else "F32"
        stream_adapter(partial, [*modules, *added.values()], dtype,
                       lambda name, factor: _padded(lora, added, name, factor, rank).to(
                           torch_dtype(dtype)),
                       base_name=str(lora.config.get("base_model_name_or_path") or ""),
                       all_modules=_all_modules(lora, added))
        if lora.sidecar is not None:
            _widen(lora.sidecar, rank, added).write(partial)
        manifest.write(partial, rank=rank, modules=len(modules), added=sorted(added))
    return out


def _refuse_rest(lora: Adapter) -> None:
    rest = sorted([*lora.embeddings, *lora.biases, *lora.absolutes])
    if rest or not lora.modules:
        raise CompatibilityError(
            f"{lora.directory}: holds more than lora_A and lora_B of linear weights "
            f"({', '.join(rest[:3])}); no engine serves these, merge the adapter instead")


def _missing(lora: Adapter, rank: int) -> Iterator[tuple[str, LoraModule]]:
    """Modules to add as zeros, with the shapes of the sidecar's base."""
    wanted = sorted(_stacked(lora) - set(lora.modules))
    shapes = lora.sidecar.base.shapes if lora.sidecar is not None else {}
    for name in wanted:
        shape = shapes.get(f"{name}.weight")
        if shape is not None:
            yield name, LoraModule(name, rank, 1.0, *shape)
        elif lora.sidecar is None:
            raise CompatibilityError(
                f"{lora.directory}: {name} is not adapted but is stacked with what is, and without "
                "a sidecar its shape is not known; extract the adapter with `extend extract`")


def _stacked(lora: Adapter) -> set[str]:
    """Every module that some engine stacks with an adapted one, adapted or not."""
    found = set()
    for name in lora.modules:
        match, expert = _STACK.fullmatch(name), _EXPERT.fullmatch(name)
        if match:
            group = ("q_proj", "k_proj", "v_proj") if match[2] in ("q_proj", "k_proj", "v_proj") \
                else ("gate_proj", "up_proj")
            found |= {f"{match[1]}.{part}" for part in group}
        if expert and lora.sidecar is not None:
            found |= {n.removesuffix(".weight") for n in lora.sidecar.base.shapes
                      if n.startswith(f"{expert[1]}.")}
    return found


def _padded(lora: Adapter, added: dict[str, LoraModule], name: str, factor: str,
            rank: int) -> torch.Tensor:
    """lora_A [rank, in] or scaled lora_B [out, rank] in fp32, zeros where there was nothing."""
    if name in added:
        shape = ((rank, added[name].in_features) if factor == "lora_A"
                 else (added[name].out_features, rank))
        return torch.zeros(shape)
    lora_a, lora_b = lora.read_factors(name)
    rest = rank - lora_a.shape[0]
    if factor == "lora_A":
        return torch.nn.functional.pad(lora_a, (0, 0, 0, rest))
    return torch.nn.functional.pad(lora_b * lora.modules[name].scaling, (0, rest))


def _all_modules(lora: Adapter, added: dict[str, LoraModule]) -> list[str]:
    shapes = lora.sidecar.base.shapes if lora.sidecar is not None else ()
    return [*(name.removesuffix(".weight") for name in shapes), *lora.modules, *added]


def _widen(sidecar: Sidecar, rank: int, added: dict[str, LoraModule]) -> Sidecar:
    modules = {name: report.model_copy(update={"rank": rank})
               for name, report in sidecar.modules.items()}
    for name, module in added.items():
        modules[name] = ModuleReport(shape=(module.out_features, module.in_features), rank=rank,
                                     delta_norm=0.0, relative_norm=0.0, residual=0.0, energy=1.0)
    names = {f"{name}.weight" for name in added}
    return sidecar.model_copy(update={
        "modules": modules, "unchanged": [n for n in sidecar.unchanged if n not in names]})
