"""The stage `merge`: an adapter into any fine-tune of its base, tensor by tensor."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch

from extend.adapter_format.peft_files import Adapter, stored_dtype
from extend.adapter_format.sidecar import HEAD_NAME, RopeChange, parameter_infos, tied_copy
from extend.checkpoint import (
    Checkpoint,
    TensorInfo,
    copy_side_files,
    torch_dtype,
    write_checkpoint,
)
from extend.errors import CheckpointError
from extend.manifest import Manifest
from extend.merge.compat import check_fit, context_change
from extend.merge.preview import announce, check_weight, out_dtype_name, preview
from extend.merge.related import require_related
from extend.model_config import read_config
from extend.output import atomic_directory, write_json

log = logging.getLogger(__name__)

_BLOCK_BYTES = 2**27  # fp32 scratch per block of rows
_Rows = slice | EllipsisType


def merge(adapter: Path | str, target: Path | str, out: Path | str, *, weight: float = 1.0,
          sidecar: bool = True, dtype: str | None = None, rope_from: Path | str | None = None,
          overwrite: bool = False, dry_run: bool = False) -> Path:
    """Give a fine-tune the long context of an adapter.

    Each weight becomes W + weight * (scaling * B A, or the sidecar's delta), summed in fp32 and
    rounded once. Config keys of RoPE and length come from the long model; everything else, with
    tokenizer, chat template and generation config, from the target.

    Args:
        adapter: an adapter directory, ours or PEFT's.
        target: checkpoint directory; a fine-tune of the adapter's base.
        out: the checkpoint directory to make.
        weight: of all deltas. The RoPE change has no half way and is written whole for any
            weight; 0 leaves the target's weights bit for bit and writes the long RoPE alone.
        sidecar: False leaves the deltas of norms, biases and embeddings out.
        dtype: float32, bfloat16 or float16 for all floating-point weights; None keeps each
            tensor's own.
        rope_from: for an adapter without a sidecar, the model whose RoPE and lengths to write.
        overwrite: replace `out` if it exists.
        dry_run: only check, from headers and configs, and log what would be written; raises one
            CompatibilityError with every problem that `preview` finds.

    Returns:
        `out`; after a dry run nothing new lies there.

    Raises:
        RecipeError: an option out of range.
        CompatibilityError: the adapter does not fit the target, or is not a plain LoRA.
        CheckpointError: a file is missing or damaged, a merged value overflows its dtype, or
            `out` cannot be written.
    """
    if dry_run:
        found = preview(adapter, target, out, weight=weight, sidecar=sidecar, dtype=dtype,
                        rope_from=rope_from, overwrite=overwrite)
        found.raise_if_any()
        log.info("%s", found.text())
        return Path(out)
    check_weight(weight)
    out_dtype = out_dtype_name(dtype)
    lora, config, files = Adapter(adapter), read_config(target), Checkpoint(target)
    change = context_change(lora, config, rope_from)
    infos = parameter_infos(config, files)
    check_fit(lora, config, infos)
    related = require_related([lora.directory] if weight else [], None, files, infos)
    inputs = {"adapter": adapter, "target": target}
    if rope_from is not None:
        inputs["rope_from"] = Path(rope_from) / "config.json"
    with atomic_directory(out, overwrite=overwrite) as partial:
        manifest = Manifest("merge", inputs,
                            {"weight": weight, "sidecar": sidecar, "dtype": dtype})
        head = tied_copy(config, files)
        written = announce(files, infos, out_dtype, head)
        side = lora.sidecar.tensors if lora.sidecar is not None and sidecar and weight else {}
        summed = _Sum(lora, files, weight, frozenset(side), {i.name: i for i in written}, head)
        write_checkpoint(partial, written, summed.read, file_of=files.file_of)
        write_json(partial / "config.json", _config(config.raw, change, dtype))
        copy_side_files(files.directory, partial, max_len=change.max_position_embeddings_after)
        summary = _summary(lora, summed, change)
        summary["dropped_buffers"] = sorted(set(files.infos) - {info.name for info in written})
        manifest.write(partial, **summary, lineage=related)
    log.info("merged %(modules)d modules and %(sidecar_tensors)d sidecar tensors into %(tensors)d "
             "tensors; context %(max_position_embeddings)d tokens", summary)
    return Path(out)


def _config(raw: dict[str, Any], change: RopeChange, dtype: str | None) -> dict[str, Any]:
    config = change.apply(raw)
    if dtype is not None:
        # transformers 4 reads torch_dtype, transformers 5 writes dtype and reads both.
        for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["torch_dtype"]:
            config[key] = str(stored_dtype(dtype)).removeprefix("torch.")
    return config


def _summary(lora: Adapter, summed: "_Sum", change: RopeChange) -> dict[str, Any]:
    side = lora.sidecar.tensors if lora.sidecar is not None else {}
    return {"tensors": len(summed.written), "modules": len(lora.modules) if summed.weight else 0,
            "sidecar_tensors": len(summed.side), "sidecar_left_out": len(side) - len(summed.side),
            "rope_theta": change.after["rope_theta"],
            "max_position_embeddings": change.max_position_embeddings_after}


@dataclass
class _Sum:
    """Computes one output tensor at a time; holds none of them.

    Attributes:
        side: names whose delta the sidecar gives.
        written: what to write, with the dtype to round to.
        head: the embedding that a stored `lm_head.weight` repeats, or None.
    """

    lora: Adapter
    target: Checkpoint
    weight: float
    side: frozenset[str]
    written: dict[str, TensorInfo]
    head: str | None

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """The merged tensor in its announced dtype, block of rows by block of rows.

        A weight that nothing is added to is not touched: x + 0 would turn -0.0 into 0.0.
        """
        source = self.head if name == HEAD_NAME and self.head else name
        base, dtype = self.target.read(source), torch_dtype(self.written[name].dtype)
        delta = self._delta(source)
        for rows in _row_blocks(base):
            merged = base[rows].to(dtype) if delta is None else (
                delta(rows).add_(base[rows]).to(dtype))
            if merged.is_floating_point() and not bool(torch.isfinite(merged).all()):
                raise CheckpointError(f"tensor {name} holds infinite or NaN values once merged as "
                                      f"{dtype}; check the target, or give --dtype bf16 or fp32")
            yield merged

    def _delta(self, source: str) -> Callable[[_Rows], torch.Tensor] | None:
        """Rows -> their fp32 delta, a tensor of its own; None where nothing is added."""
        module = self.lora.modules.get(source.removesuffix(".weight"))
        if module is not None and self.weight:
            lora_a, lora_b = self.lora.read_factors(module.name)
            scale = self.weight * module.scaling
            return lambda rows: (lora_b[rows] @ lora_a).mul_(scale)
        if source in self.side:
            whole = self.lora.read_side_delta(source)
            return lambda rows: whole[rows].mul(self.weight)
        return None


def _row_blocks(x: torch.Tensor) -> list[_Rows]:
    """Indices that together take every row of `x` once."""
    if x.dim() == 0:
        return [...]
    row_bytes = 4 * math.prod(x.shape[1:])
    rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]
