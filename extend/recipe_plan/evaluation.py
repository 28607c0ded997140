"""What an eval stage takes: its prompts, each read once."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from extend.capacity import Machine, ModelShape, gpu_rates, prefill_seconds
from extend.errors import ExtendError
from extend.options import EvalOptions, input_paths, resolve_inputs
from extend.recipe_plan.cost import START_SECONDS, STREAMED, Cost, add_bytes
from extend.recipe_plan.facts import Facts, shape_unknown

_CHUNK = 131072  # tokens in one forward on a GPU, as in extend.evaluate.load
_VALUE = 2
_MODELS = {"divergence": 2, "key-tokens": 2}  # measures that read every prompt with two models
_WRITES = ("generated", "harness")
_UNTOLD = 512  # tokens of a prompt that is in a file


def eval_cost(options: EvalOptions, look: Callable[[str], Facts], machine: Machine) -> Cost:
    """Reading of prompts is timed; writing of answers is not."""
    reads = add_bytes(*(look(value).num_bytes for _, value in input_paths(options)))
    if options.server is not None:
        return Cost(reads=reads, writes=2**20, notes=("the server's time is not known",))
    model = look(options.model)
    if model.shape is None:
        return Cost(reads=reads, writes=2**20, notes=(shape_unknown(options.model, model),))
    shape, notes = model.shape, []
    here = resolve_inputs(options, lambda value: str(look(value).path or value))
    prompts = list(_prompts(here, notes))
    ranks = options.context_parallel
    gpus = machine.num_gpus if options.nproc == "auto" else max(options.nproc, ranks)
    longest = max((length for length, _ in prompts), default=1)
    cost = Cost(
        reads=reads, writes=2**20, gpus=gpus, fits=gpus <= machine.num_gpus,
        seconds=_seconds(shape, prompts, ranks, gpus, machine) + START_SECONDS
        + (model.num_bytes or 0) / STREAMED,
        gpu_bytes=read_bytes(shape, longest, ranks, options.chunk or _CHUNK), notes=notes)
    if not cost.fits:
        notes.insert(0, f"asks for {gpus} GPUs, but there are {machine.num_gpus}")
    elif cost.gpu_bytes > machine.gpu_memory_bytes:
        notes.insert(0, f"does not fit: {cost.gpu_bytes / 2**30:.1f} GiB of a GPU of "
                        f"{machine.gpu_memory_bytes / 2**30:.1f}; spread rows with a larger "
                        "context_parallel")
        return replace(cost, fits=False)
    return cost


def _seconds(shape: ModelShape, prompts: list[tuple[int, float]], ranks: int, gpus: int,
             machine: Machine) -> float:
    rates, groups = gpu_rates(machine.gpu), max(1, gpus // ranks)
    return sum(count * prefill_seconds(shape, length, machine, rates, ranks=ranks)
               for length, count in prompts) / groups


def read_bytes(shape: ModelShape, length: int, ranks: int, chunk: int = _CHUNK) -> float:
    """Of one of `ranks` GPUs that read a prompt together: weights, keys and values, and what a
    layer needs for the tokens of one forward.
    """
    local = length / ranks
    kept = sum(min(local, window or local) for window in shape.windows
               or (None,) * shape.num_layers)
    at_once = min(local, chunk) * (3 * shape.active_inner + 4 * shape.hidden + 2 * shape.q_width
                                   + 2 * shape.kv_width)
    return _VALUE * (shape.parameters + 2 * shape.kv_width * kept + at_once)


def _prompts(options: EvalOptions, notes: list[str]) -> Iterator[tuple[int, float]]:
    """(tokens, how often they are read) of all tasks; what cannot be counted goes into `notes`."""
    from extend.evaluate.plan import expand, plan_tasks

    writing: list[str] = []
    for entry in expand(options.tasks):
        label = entry if isinstance(entry, str) else entry.get("name", entry["task"])
        try:
            planned = plan_tasks([entry], lengths=options.lengths, depths=options.depths,
                                 trials=options.trials)
        except (ExtendError, OSError) as error:
            notes.append(f"{label} is not counted: {error}")
            continue
        for task in planned:
            if task.task.measure in _WRITES:
                writing.append(label)
            yield from _prompts_of(task.task, task.cells)
    if writing:
        notes.append(f"answers that are written are not counted ({', '.join(writing)})")


def _prompts_of(task: Any, cells: Any) -> Iterator[tuple[int, float]]:
    if task.measure == "stream":  # all of the grid in one pass a trial, and its questions
        yield max(cell.length or 1 for cell in cells), 1.3 * max(cell.trials for cell in cells)
        return
    longest = max(cell.length or _UNTOLD for cell in cells)
    for cell in cells:
        length, count = cell.length or _UNTOLD, float(cell.trials)
        if task.measure == "sliding":
            count *= 1 + max(0, (task.span or longest) - length) / task.stride
        yield length, count * _MODELS.get(task.measure, 1)
