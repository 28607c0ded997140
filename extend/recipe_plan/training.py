"""What a train stage takes: `extend.capacity` with the recipe's own options."""

from collections.abc import Callable
from dataclasses import replace

from extend.capacity import (
    Machine,
    ModelShape,
    Setup,
    gpu_rates,
    least_recomputed,
    phase_setup,
    plan_memory,
    plan_time,
)
from extend.capacity.memory import MemoryPlan
from extend.capacity.parameters import count_parameters
from extend.capacity.recompute import USABLE_FRAC
from extend.data_options import TextData
from extend.recipe_plan.cost import Cost, Phase, add_bytes
from extend.recipe_plan.facts import NOT_KNOWN, Facts
from extend.train_options import TrainOptions

_EXPORT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHORT_SECONDS = 0.1
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def train_cost(options: TrainOptions, look: Callable[[str], Facts], machine: Machine) -> Cost:
    """Steps alone are timed: loading, tokenising, checkpoints and export come on top."""
    model = look(options.model)
    texts = [look(source.path).num_bytes for source in options.data if source.path is not None]
    reads = add_bytes(model.num_bytes, *texts)
    notes = _tell_data(options, texts)
    if model.shape is None:
        return Cost(reads=reads, writes=None, output=Facts(),
                    notes=(NOT_KNOWN.format(options.model), *notes))
    shape = model.shape
    world = machine.num_gpus if options.nproc == "auto" else options.nproc
    size = shape.parameters * _EXPORT_BYTES.get(options.export_dtype or "", model.value_bytes)
    output = replace(model, num_bytes=size, where="stage", download_bytes=0, source="", problem="",
                     value_bytes=size // shape.parameters,
                     embeddings_kept=not _trains_embeddings(options))
    known = Cost(reads=reads, writes=size, scratch=_checkpoints(shape, options, world),
                 output=output, gpus=world, notes=notes)
    problem = _layout_problem(options, world, machine)
    if problem:
        return replace(known, fits=False, notes=(problem, *notes))
    return _timed(known, options, shape, replace(
        machine, num_gpus=world, hosts=-(-world // machine.gpus_per_host)))


def _tell_data(options: TrainOptions, texts: list[int | None]) -> list[str]:
    notes = []
    size = add_bytes(*texts)
    if texts:
        notes.append("tokens of its text are kept for other runs, about "
                     + ("as large as the text" if not size else f"{size / 2**30:.1f} GiB")
                     + (f", in {options.token_cache}" if options.token_cache else ""))
    if options.document_mask and any(isinstance(source, TextData) for source in options.data):
        notes.append("less where a row holds several documents, which do not see one another")
    if options.trainable and options.mode == "full":
        notes.append("counted as if all weights were trained, not only what `trainable` matches")
    return notes


def _trains_embeddings(options: TrainOptions) -> bool:
    import re

    if options.mode == "lora":
        return bool(options.trained_beside)
    return not options.trainable or any(re.search(pattern, name) for pattern in options.trainable
                                        for name in _EMBEDDINGS)


def _checkpoints(shape: ModelShape, options: TrainOptions, world: int) -> int:
    """Bytes of the checkpoints that stay until the run is done, and of one being written."""
    setup = replace(phase_setup(options, options.schedule[-1], world=world), tp=1)
    counts = count_parameters(shape, setup)
    trained = counts.trained_root + shape.num_layers * counts.trained_layer
    moments = 2.03 if options.optimizer == "adamw-8bit" else 2 * setup.weight_bytes
    return round(trained * (setup.weight_bytes + moments)) * (options.keep_checkpoints + 1)


def _layout_problem(options: TrainOptions, world: int, machine: Machine) -> str | None:
    """Why the rows cannot be dealt to the GPUs, if they cannot."""
    if world > machine.num_gpus:
        return f"nproc is {world}, but there are {machine.num_gpus} GPUs"
    if world % options.tensor_parallel:
        return f"{world} GPUs do not divide by tensor_parallel {options.tensor_parallel}"
    if world % -(-world // machine.gpus_per_host):
        return f"{world} GPUs do not divide over hosts of {machine.gpus_per_host}"
    for phase in options.schedule:
        setup = phase_setup(options, phase, world=world)
        if phase.length % (2 * setup.cp if setup.cp > 1 else 1):
            return (f"{phase.length} tokens do not divide over {setup.cp} GPUs that share a row "
                    "(two pieces each)")
    return None


def _timed(known: Cost, options: TrainOptions, shape: ModelShape, machine: Machine) -> Cost:
    usable = USABLE_FRAC * machine.gpu_memory_bytes
    setups = [phase_setup(options, phase, world=machine.num_gpus, hosts=machine.hosts)
              for phase in options.schedule]
    if options.recomputed_layers == "auto":
        least = [least_recomputed(shape, setup, usable) for setup in setups]
        layers = max(shape.num_layers if n is None else n for n in least)
        setups = [setup.with_recomputed(layers) for setup in setups]
    memories = [plan_memory(shape, setup) for setup in setups]
    phases = [_phase(shape, setup, memory, phase.num_steps, machine) for setup, memory, phase in
              zip(setups, memories, options.schedule, strict=True)]
    host = max((m.host_bytes + m.host_state_bytes) * machine.gpus_per_host for m in memories)
    needed = max(phase.gpu_bytes for phase in phases)
    notes = [] if needed <= usable else [
        f"does not fit: {needed / 2**30:.1f} GiB of a GPU, of which {usable / 2**30:.1f} may be "
        f"used; `extend plan CONFIG --to {options.schedule[-1].length} --gpus N` says what would"]
    if machine.host_memory_bytes and host > machine.host_memory_bytes:
        notes.append(f"does not fit: {host / 2**30:.0f} GiB of host memory of "
                     f"{machine.host_memory_bytes / 2**30:.0f}")
    slow = [] if min(phase.step_seconds for phase in phases) >= _SHORT_SECONDS else [
        f"steps of under {_SHORT_SECONDS} s take longer: GPUs wait for the processor, which is not "
        "counted"]
    return replace(known, seconds=sum(phase.seconds for phase in phases),
                   spread=max(phase.spread for phase in phases), gpu_bytes=needed, host_bytes=host,
                   fits=not notes, phases=phases, notes=(*notes, *slow, *known.notes))


def _phase(shape: ModelShape, setup: Setup, memory: MemoryPlan, steps: int,
           machine: Machine) -> Phase:
    time = plan_time(shape, setup, machine, gpu_rates(machine.gpu))
    return Phase(length=setup.length, rows=setup.batch_rows, steps=steps,
                 step_seconds=time.seconds, mfu=time.mfu, spread=time.spread,
                 gpu_bytes=memory.device_bytes + memory.outside_bytes,
                 recomputed=min(setup.recomputed, shape.num_layers))
