"""The stage `merge`: deltas into any fine-tune of their base, tensor by tensor."""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from extend.adapter_format.peft_files import stored_dtype
from extend.adapter_format.serving_files import checkpoint_serving, write_serving
from extend.adapter_format.sidecar import RopeChange
from extend.checkpoint import copy_side_files, write_checkpoint
from extend.console import progress
from extend.errors import ExtendError, RecipeError
from extend.inputs import takes_models
from extend.manifest import Manifest, versions
from extend.merge.dry_run import preview
from extend.merge.prepare import Plan, Problems, prepare
from extend.merge.related import require_related
from extend.merge.request import Paths, Request, Weights
from extend.merge.total import Total
from extend.model_config import RopeSpec
from extend.output import atomic_directory, stamp_files, write_json
from extend.rope.engines import differing_engines

log = logging.getLogger(__name__)

_MOST_SHARDS_AT_ONCE = 4
_MOST_BLOCKS_AT_ONCE = 16


@takes_models("adapter", "target", "tuned", "base", "rope_from")
def merge(adapter: Paths, target: Path | str, out: Path | str, *, weight: Weights = 1.0,
          tuned: Path | str | None = None, base: Path | str | None = None, method: str = "add",
          options: Mapping[str, Any] | None = None, layer_weights: Any = None,
          sidecar: bool = True, dtype: str | None = None, rope_from: Path | str | None = None,
          device: str = "auto", overwrite: bool = False, dry_run: bool = False) -> Path:
    """Give a fine-tune the long context of adapters, or of a long model itself.

    Each weight becomes W + the sum of weight * delta, added up in fp32 and rounded once. A delta is
    scaling * B A, or what the sidecar holds, or tuned - base. Config keys of RoPE and length come
    from the long model; everything else, with tokenizer, chat template and generation config, from
    the target. Embedding rows go to the target's row of the same token.

    An interrupted merge goes on from its finished shards when it is called again with the same
    inputs and options.

    Args:
        adapter: an adapter directory, ours, PEFT's or mergekit's; several; or None.
        target: checkpoint directory; a fine-tune of the deltas' base.
        out: the checkpoint directory to make.
        weight: of all deltas, or one for each adapter and then one for tuned - base. The RoPE
            change has no half way and is written whole for any weight; 0 leaves the target's
            weights bit for bit and writes the long RoPE alone.
        tuned: a long model, of which tuned - base is added whole; needs `base`.
        base: the model that all started from. Also for methods that look at what the target
            changed, and for adapters with whole values, such as mergekit's.
        method: how a delta is fitted to the target, in `extend.merge.methods.METHODS`; or a method
            of mergekit, as `mergekit:ties` (see `extend.merge.mergekit.Mergekit`), which needs
            `base`.
        options: of the method.
        layer_weights: factors of single parameters, see `LayerWeights`.
        sidecar: False leaves the deltas of norms, biases and embeddings out.
        dtype: float32, bfloat16 or float16 for all floating-point weights; None keeps each
            tensor's own.
        rope_from: for adapters without a sidecar, the model whose RoPE and lengths to write.
        device: cpu, cuda, or auto: cuda, where there is one, for methods that decompose matrices.
            The others do less for a value than it costs to bring it to a GPU and back.
        overwrite: replace `out` if it exists.
        dry_run: only check, from headers and configs, and log what would be written; raises one
            CompatibilityError with every problem that `preview` finds.

    Returns:
        `out`; after a dry run nothing new lies there.

    Raises:
        RecipeError: an option out of range, or an input that lies in `out`.
        CompatibilityError: a delta does not fit the target, two deltas want different RoPEs, or
            an adapter is not a plain LoRA.
        CheckpointError: a file is missing or damaged, a merged value overflows its dtype, or
            `out` cannot be written.
    """
    given = {"weight": weight, "tuned": tuned, "base": base, "method": method, "options": options,
             "layer_weights": layer_weights, "sidecar": sidecar, "dtype": dtype,
             "rope_from": rope_from, "overwrite": overwrite}
    if dry_run:
        found = preview(adapter, target, out, **given)
        found.raise_if_any()
        log.info("%s", found.text())
        return Path(out)
    request = Request.of(adapter, target, out, **given)
    plan = prepare(request, Problems(collect=False))
    device = _pick_device(device, decomposes=not plan.method.by_rows)
    for line in plan.vocabulary_lines():
        log.info("%s", line)
    with atomic_directory(out, overwrite=overwrite, inputs=request.inputs(),
                          mark=_mark(request, device)) as partial:
        manifest = Manifest("merge", request.inputs(), request.settings(),
                            getattr(plan.method, "seed", None))
        with _looking(request, plan) as looking:
            _write_weights(partial, plan, device, looking)
            related = looking.result()
        write_json(partial / "config.json", _config(plan.config.raw, plan.change, dtype))
        copy_side_files(plan.files.directory, partial,
                        max_len=plan.change.max_position_embeddings_after)
        _write_serving(partial, plan)
        summary = {**_summary(plan), "device": device}
        manifest.write(partial, **summary, lineage=related)
    log.info("merged %(modules)d modules, %(sidecar_tensors)d sidecar tensors and %(raw_tensors)d "
             "differences into %(tensors)d tensors; context %(max_position_embeddings)d tokens",
             summary, extra=progress(1, 1))
    return Path(out)


@contextlib.contextmanager
def _looking(request: Request, plan: Plan) -> Iterator[Future[dict[str, Any]]]:
    """`require_related` in the background: a disk takes seconds for its reads here and there.

    What it raises goes before an error of the block, which may well follow from it.
    """
    adapters = [path for path, weight in zip(request.adapters, request.weights) if weight]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, "lineage", torch.set_num_threads, (-(-before // 2),)) as pool:
            looking = pool.submit(require_related, adapters, request.base, plan.files, plan.infos)
            try:
                yield looking
            except ExtendError:
                looking.result()
                raise
    finally:
        torch.set_num_threads(before)


def _write_serving(directory: Path, plan: Plan) -> None:
    rope = RopeSpec.from_json(plan.change.after)
    write_serving(directory, checkpoint_serving(
        plan.change.max_position_embeddings_after,
        notes=differing_engines(str(plan.config.raw.get("model_type")), rope)))


def _mark(request: Request, device: str) -> str:
    """What must be the same for shards of an interrupted merge to be used again."""
    return json.dumps([stamp_files(request.inputs()), request.settings(), device, versions()],
                      sort_keys=True, default=str)


def _write_weights(partial: Path, plan: Plan, device: str, looking: Future) -> None:
    """Write all of them, unless `looking` fails meanwhile: its error ends the work."""
    file_of = plan.files.file_of
    shards = len({file_of[info.name] for info in plan.written})
    writers = max(1, min(shards, _MOST_SHARDS_AT_ONCE, (os.cpu_count() or 1) // 2))
    with _pool(plan, writers) as (pool, threads):
        total = Total(plan, {info.name: info for info in plan.written}, pool, device,
                      ahead=-(-threads // writers))

        done = itertools.count()

        def read(name: str) -> Iterator[torch.Tensor]:
            if looking.done():
                looking.result()
            log.info("merging %s", name, extra=progress(next(done), len(plan.written)))
            return total.read(name)

        write_checkpoint(partial, plan.written, read, file_of=file_of, threads=writers)


@contextlib.contextmanager
def _pool(plan: Plan, writers: int) -> Iterator[tuple[Executor, int]]:
    """Threads that work on blocks of rows, and how many; those on whole matrices are as the writers
    and share torch's threads, because a decomposition gains by several.
    """
    before = torch.get_num_threads()
    count = min(before, _MOST_BLOCKS_AT_ONCE) if plan.method.by_rows else min(before, writers)
    share = 1 if plan.method.by_rows else before // count
    try:
        with ThreadPoolExecutor(count, "merge", torch.set_num_threads, (share,)) as pool:
            yield pool, count
    finally:
        torch.set_num_threads(before)


def _pick_device(device: str, *, decomposes: bool) -> str:
    """What `device` asks for; CUDA takes seconds to start, so it is left alone where it can be."""
    if device == "auto":
        return "cuda" if decomposes and torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise RecipeError(f"device: unknown {device!r}; choose one of auto, cpu, cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"device is {device!r} but torch sees no CUDA device; choose cpu or auto")
    return device


def _config(raw: Mapping[str, Any], change: RopeChange, dtype: str | None) -> dict[str, Any]:
    config = change.apply(raw)
    if dtype is not None:
        # transformers 4 reads torch_dtype, transformers 5 writes dtype and reads both.
        for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["torch_dtype"]:
            config[key] = str(stored_dtype(dtype)).removeprefix("torch.")
    return config


def _summary(plan: Plan) -> dict[str, Any]:
    changed = plan.changed()
    return {"tensors": len(plan.written), "modules": len(changed["modules"]),
            "sidecar_tensors": len(changed["sidecar"]), "raw_tensors": len(changed["models"]),
            "sidecar_left_out": plan.left_out(), "vocabulary": plan.vocabulary_lines(),
            "rope_theta": plan.change.after["rope_theta"],
            "max_position_embeddings": plan.change.max_position_embeddings_after,
            "dropped_buffers": plan.dropped_buffers()}
