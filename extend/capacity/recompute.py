"""How many layers must be computed again for their backward, so that the rest fits on a device."""

from math import gcd

from extend.capacity.memory import MemoryPlan, plan_memory
from extend.capacity.setup import Setup, Trained, auto_tile
from extend.capacity.shape import ModelShape, model_shape
from extend.data_options import source_weights
from extend.errors import RecipeError
from extend.model_config import ModelConfig
from extend.train_options import Phase, TrainOptions

USABLE_FRAC = 0.9
"""Of a device's memory, what a plan may fill: the rest is for the context of CUDA, NCCL and what
the allocator cannot use between blocks. On an H200 of 139.8 GiB a step of 129.6 GiB first took 6.38
s and then, with all memory reserved, 6.88 s; one of 124.6 GiB kept its pace."""
_MICRO_TOKENS = 8192  # as in extend.train.step


def phase_setup(options: TrainOptions, phase: Phase, *, world: int, hosts: int = 1,
                recomputed: int = 10**9) -> Setup:
    """The step that `train` takes in a phase, as numbers.

    Args:
        world: processes of all hosts.
        recomputed: layers that are computed again; those of the options unless they say auto.
    """
    tp = options.tensor_parallel
    ranks = world // tp
    dp = _groups(phase, ranks)
    cp = ranks // dp
    rows = phase.batch_rows // dp
    longest = max(p.length // (ranks // _groups(p, ranks)) for p in options.schedule)
    tile = auto_tile(longest) if options.tile_tokens == "auto" else options.tile_tokens
    if options.recomputed_layers != "auto":
        recomputed = 10**9 if options.recomputed_layers == "all" else options.recomputed_layers
    distilled, taught_length = _taught(options, phase)
    return Setup(
        length=phase.length, batch_rows=phase.batch_rows, dp=dp, cp=cp, tp=tp, hosts=hosts,
        replicas=1 if options.shard_over == "all" else max(1, ranks // options.shard_over),
        micro_rows=min(rows, max(1, _MICRO_TOKENS * cp // phase.length)), recomputed=recomputed,
        kept_attention=10**9 if options.kept_attention == "all" else options.kept_attention,
        host_bytes=options.host_memory, kept_form=options.kept_form, tile=tile,
        compiled=options.compile is not False,
        weight_bytes=4 if options.weight_dtype == "float32" else 2, trained=_trained(options),
        lora_rank=options.lora_rank, optimizer=options.optimizer,
        loss_chunk=options.loss_chunk, teacher=options.distills, distilled=distilled,
        taught_length=taught_length, strategy=options.strategy)


def _taught(options: TrainOptions, phase: Phase) -> tuple[float, int]:
    """The share of a phase's rows that the teacher reads too, and the most tokens it reads at once.
    """
    weights = source_weights(options.data, phase.mix)
    taught = [(weight, min(data.document_length or phase.length, phase.length))
              for data, weight in zip(options.data, weights, strict=True)
              if data.distill and weight]
    return (sum(weight for weight, _ in taught) / sum(weights),
            max((length for _, length in taught), default=0))


def _groups(phase: Phase, ranks: int) -> int:
    """Of processes that share rows, as `extend.train.mesh.split_world` makes them."""
    return gcd(phase.batch_rows, ranks // min(phase.context_parallel, ranks))


def _trained(options: TrainOptions) -> Trained:
    if options.mode == "lora":
        return "lora+" if options.trained_beside else "lora"
    return "all"  # also where expressions choose fewer: what is not trained is not known here


def least_recomputed(shape: ModelShape, setup: Setup, usable_bytes: float) -> int | None:
    """The fewest layers that must be computed again; None if not even all are enough.

    Args:
        usable_bytes: of a device, for torch's allocator and the buffers that GPUs share.
    """
    return next((layers for layers in range(shape.num_layers + 1)
                 if _needed(plan_memory(shape, setup.with_recomputed(layers))) <= usable_bytes),
                None)


def _needed(plan: MemoryPlan) -> float:
    return plan.device_bytes + plan.outside_bytes


def choose_recomputed_layers(config: ModelConfig, options: TrainOptions, *, world: int,
                             device_bytes: int, hosts: int = 1) -> int:
    """What `recomputed_layers: auto` stands for: as few as fit in every phase.

    All layers where not even that fits, by this count: the run may still, and says itself if not.

    Args:
        world: processes of all hosts.
        device_bytes: memory of the smallest device, all of it.

    Raises:
        RecipeError: a device without memory.
    """
    if device_bytes < 1:
        raise RecipeError(f"recomputed_layers auto: a device of {device_bytes} bytes; give a "
                          "number of layers")
    shape = model_shape(config)
    found = [least_recomputed(shape, phase_setup(options, phase, world=world, hosts=hosts),
                              USABLE_FRAC * device_bytes) for phase in options.schedule]
    return max(shape.num_layers if layers is None else layers for layers in found)
