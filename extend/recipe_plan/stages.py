"""What each kind of stage takes. To add one: a function, a line in COSTS, a test."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from extend.adapter_options import AdapterReportOptions, CutOptions, ExtractOptions
from extend.capacity import Machine, ModelShape
from extend.capacity.parameters import adapter_width
from extend.options import MergeOptions, ReportOptions, RescaleOptions, input_paths
from extend.recipe_plan.cost import Cost, Estimate, add_bytes, streamed_seconds
from extend.recipe_plan.evaluation import eval_cost
from extend.recipe_plan.facts import NOT_KNOWN, Facts
from extend.recipe_plan.training import train_cost
from extend.transfer_options import FitOptions, RepairOptions

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_RANK_BY_NOISE = {4: 32, 2: 512}  # at most, by the bytes of the tuned model's weights
_SMALL = 2**20
_TORCH_BYTES = 2**29  # of a process that has loaded torch; assumed

Look = Callable[[str], Facts]


def rescale_cost(options: RescaleOptions, look: Look, machine: Machine) -> Cost:
    model = look(options.model)
    shape = model.shape
    if shape is not None and options.sliding_window == "drop" and None not in shape.windows:
        shape = replace(shape, windows=())  # all layers alike; else their type keeps its window
    output = replace(model, shape=shape, where="stage", download_bytes=0, source="", problem="",
                     path=None, embeddings_kept=True)
    return Cost(reads=model.num_bytes, writes=_SMALL, output=output,
                seconds=streamed_seconds(model.num_bytes), host_bytes=_TORCH_BYTES,
                notes=("weights are hard links; copies where --out is on another disk",))


def extract_cost(options: ExtractOptions, look: Look, machine: Machine) -> Cost:
    base, tuned = look(options.base), look(options.tuned)
    reads = add_bytes(base.num_bytes, tuned.num_bytes)
    shape = tuned.shape or base.shape
    if shape is None:
        return Cost(reads=reads, writes=None, notes=(NOT_KNOWN.format(options.base),))
    notes = []
    rank = options.rank
    if rank is None and options.energy is None and options.adapter_bytes is None:
        rank = _RANK_BY_NOISE[tuned.value_bytes]
        notes.append(f"at most rank {rank}: each matrix keeps what stands out of rounding")
    if options.energy is not None:
        notes.append("the size of an adapter of an energy is not known before")
    matrices = options.adapter_bytes
    if rank is not None:
        matrices = round(rank * adapter_width(shape) * shape.num_layers) * _BYTES[options.dtype]
    kept = tuned.embeddings_kept or not options.embeddings
    beside = 4 * (shape.num_layers * shape.norm_values + shape.hidden)
    if not kept:
        beside += 4 * shape.embedding * (2 - shape.tied)
        notes.append(f"{4 * shape.embedding * (2 - shape.tied) / 2**30:.1f} GiB of it are deltas "
                     "of embeddings, if those were trained (embeddings: false leaves them out)")
    writes = add_bytes(matrices, beside)
    output = Facts(num_bytes=writes, shape=shape, rank=rank, value_bytes=_BYTES[options.dtype],
                   embeddings_kept=kept)
    return Cost(reads=reads, writes=writes, output=output, notes=notes,
                seconds=streamed_seconds(reads), gpus=machine.num_gpus,
                host_bytes=_TORCH_BYTES + 4 * _largest(shape))


def cut_cost(options: CutOptions, look: Look, machine: Machine) -> Cost:
    adapter = look(options.adapter)
    writes = options.adapter_bytes
    if options.rank is not None and adapter.shape is not None:
        size = _BYTES.get(options.dtype or "", adapter.value_bytes)
        writes = round(options.rank * adapter_width(adapter.shape)
                       * adapter.shape.num_layers) * size
    output = replace(adapter, num_bytes=writes, rank=options.rank, where="stage", path=None)
    return Cost(reads=adapter.num_bytes, writes=writes, output=output,
                seconds=streamed_seconds(adapter.num_bytes), host_bytes=adapter.num_bytes)


def adapter_report_cost(options: AdapterReportOptions, look: Look, machine: Machine) -> Cost:
    read = add_bytes(*(look(value).num_bytes for _, value in input_paths(options)))
    return Cost(reads=read, writes=_SMALL, seconds=streamed_seconds(read))


def merge_cost(options: MergeOptions, look: Look, machine: Machine) -> Cost:
    target = look(options.target)
    read = add_bytes(*(look(value).num_bytes for _, value in input_paths(options)))
    deltas = [look(value) for value in _as_list(options.adapter) + _as_list(options.tuned)]
    shape = next((facts.shape for facts in deltas if facts.shape is not None), target.shape)
    if shape is None:
        return Cost(reads=read, writes=None, notes=(NOT_KNOWN.format(options.target),))
    value_bytes = _BYTES.get(options.dtype or "", target.value_bytes)
    size = shape.parameters * value_bytes
    output = Facts(num_bytes=size, shape=shape, value_bytes=value_bytes)
    return Cost(reads=read, writes=size, output=output, seconds=streamed_seconds(read, size),
                host_bytes=_TORCH_BYTES + 2 * _largest(shape))


def fit_cost(options: FitOptions, look: Look, machine: Machine) -> Cost:
    read = add_bytes(*(look(value).num_bytes for _, value in input_paths(options)))
    return Cost(reads=read, writes=_SMALL, gpus=1,
                notes=("its time and memory are not counted",))


def repair_cost(options: RepairOptions, look: Look, machine: Machine) -> Cost:
    merged = look(options.merged)
    read = add_bytes(*(look(value).num_bytes for _, value in input_paths(options)))
    return Cost(reads=read, writes=merged.num_bytes, gpus=1,
                output=replace(merged, where="stage", path=None),
                notes=("its time and memory are not counted",))


def report_cost(options: ReportOptions, look: Look, machine: Machine) -> Cost:
    return Cost(reads=_SMALL, writes=5 * _SMALL, seconds=10.0)


def unknown_cost(options: Any, look: Look, machine: Machine) -> Cost:
    read = add_bytes(*(look(value).num_bytes for _, value in input_paths(options)))
    return Cost(reads=read, writes=None, notes=("what it takes is not counted",))


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _largest(shape: ModelShape) -> int:
    """Values of the largest matrix."""
    return shape.hidden * max(shape.vocab, shape.dense_inner)


COSTS: dict[str, Estimate] = {
    "rescale": rescale_cost, "train": train_cost, "extract": extract_cost, "cut": cut_cost,
    "adapter-report": adapter_report_cost, "merge": merge_cost, "fit": fit_cost,
    "repair": repair_cost, "eval": eval_cost, "report": report_cost}

__all__ = ["COSTS", "unknown_cost"]
