"""Seconds of a training step, by what they are spent on.

    matrix products   6 FLOP a parameter and token (4 where it is frozen), 2 more where a layer is
                      computed again, at the rate that bf16 products reach
    attention         `extend.ring.cost`, forward once and backward once; forward again in layers
                      that are computed again without keeping it
    elementwise       bytes that norms, rotations, gates, residuals and the loss must move
    communication     gathers and reductions of sharded weights, as far as nothing hides them
    host              copies of what layers keep, in part: they slow what runs beside them
    teacher           a forward for the rows that are distilled, in the pieces that it reads
    optimizer         ten values a trained parameter: reads, writes, and the norm of gradients
    launches          what the GPU waits for the host where rows are short and a model is small

`predict` of ring/cost needs torch, so this imports it when it is called.
"""

from dataclasses import dataclass

from extend.capacity.activations import VALUE, exchanges_heads
from extend.capacity.memory import MemoryPlan, count_parameters, plan_memory
from extend.capacity.rates import GpuRates
from extend.capacity.setup import Machine, Setup
from extend.capacity.shape import ModelShape

_FP32 = 4
_NARROW_HEAD, _NARROW_RATE, _NARROW_SPREAD = 64, 0.64, 0.30
_LAUNCH_SECONDS = 6e-3
"""Of a layer, forward and backward: 3 to 10 ms were seen with 30 layers of SmolLM2-135M and 8 rows
of 1K tokens on an H200, where all else takes 1 ms."""
_LAUNCH_SPREAD = 0.60
_OFFLOAD_BANDWIDTH = 100e9  # bytes/s of host memory that an update on the CPU reaches, assumed


@dataclass(frozen=True)
class TimePlan:
    """Seconds of an optimizer step.

    Attributes:
        parts: seconds by what they are for.
        tokens: of the step, over all processes.
        mfu: model FLOPs a GPU and second over the GPU's peak; recompute does not count.
        spread: by how much `seconds` may be off, as a fraction.
    """

    parts: dict[str, float]
    tokens: int
    mfu: float
    spread: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def model_flops(shape: ModelShape, setup: Setup) -> float:
    """Of a whole step over all processes, as `extend.train.size` counts them."""
    tokens = setup.length * setup.batch_rows
    linear = (6 if setup.trained == "all" else 4) * shape.matrix_parameters * tokens
    return linear + 6 * shape.q_width * shape.squares(setup.length) * setup.batch_rows


def plan_time(shape: ModelShape, setup: Setup, machine: Machine, rates: GpuRates,
              kernel: str = "auto") -> TimePlan:
    """Seconds of a step on `machine`.

    Args:
        kernel: of attention, a name of `extend.ring.cost.hardware`; auto: the GPU's default there.
    """
    memory = plan_memory(shape, setup)
    matrix = setup.micro_steps * _matrix_flops(shape, setup) / rates.matmul_flops
    attention = setup.micro_steps * _attention(shape, setup, machine, kernel)
    if exchanges_heads(setup):
        attention += rates.exchange_seconds * shape.num_layers * setup.micro_steps
    elementwise = setup.micro_steps * _traffic(shape, setup) / rates.traffic
    busy = matrix + attention + elementwise
    parts = {"matrix products": matrix, "attention": attention, "elementwise": elementwise,
             "communication": _communication(shape, setup, machine, busy),
             "host": _host(setup, memory, rates, busy),
             "optimizer": _optimizer(shape, setup, memory, rates)}
    if setup.distilled:
        pieces = setup.tokens / setup.tp / setup.taught_length
        parts["teacher"] = setup.micro_steps * setup.distilled * pieces * prefill_seconds(
            shape, setup.taught_length, machine, rates)
    launches = _LAUNCH_SECONDS * shape.num_layers * setup.micro_steps - busy
    if launches > 0:
        parts["launches"] = launches
    seconds = sum(parts.values())
    mfu = model_flops(shape, setup) / seconds / setup.world / rates.peak_flops
    narrow = shape.head_dim <= _NARROW_HEAD
    waits = parts.get("launches", 0.0) / seconds
    return TimePlan(parts, setup.length * setup.batch_rows, mfu,
                    max(rates.spread, _NARROW_SPREAD * narrow, _LAUNCH_SPREAD * waits))


def prefill_seconds(shape: ModelShape, length: int, machine: Machine, rates: GpuRates, *,
                    ranks: int = 1) -> float:
    """Seconds to read a prompt of `length` tokens on `ranks` GPUs that share it.

    The forward pass of a step without recording: what an evaluation spends most of its time on.
    """
    from extend.ring.cost.hardware import find_hardware
    from extend.ring.cost.predict import predict

    hardware, attention = find_hardware(machine.gpu), 0.0
    windows = shape.windows or (None,) * shape.num_layers
    for window in set(windows):
        attention += windows.count(window) * predict(
            "ring", heads=shape.num_heads, kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
            seq_len=length, world=ranks, gpus_per_host=machine.gpus_per_host, window=window,
            backward=False, hardware=hardware).seconds
    return attention / _head_rate(shape) + _plain_seconds(shape, length / ranks, rates)


def _plain_seconds(shape: ModelShape, tokens: float, rates: GpuRates) -> float:
    """Of a forward pass of so many tokens in one process, attention and head left out."""
    matrix = 2 * (shape.matrix_parameters - shape.embedding) * tokens / rates.matmul_flops
    moved = _plain_forward(shape, shape.q_width, shape.kv_width, shape.active_inner)
    return matrix + shape.num_layers * moved * tokens / rates.traffic


def _matrix_flops(shape: ModelShape, setup: Setup) -> float:
    """Of one process in one micro step, recompute among them."""
    again = 2 * min(setup.recomputed, shape.num_layers) / shape.num_layers
    if setup.used_tile:  # every tiled MLP runs once more in its backward
        again += 2 * shape.active_mlp_matrix / (shape.attention_matrix + shape.active_mlp_matrix)
    each = 6 if setup.trained == "all" else 4
    layers = shape.num_layers * (shape.attention_matrix + shape.active_mlp_matrix)
    return ((each + again) * layers + each * shape.embedding) * setup.tokens / setup.tp


def _attention(shape: ModelShape, setup: Setup, machine: Machine, kernel: str) -> float:
    """Of one process in one micro step, over all layers."""
    from extend.ring.cost.hardware import find_hardware
    from extend.ring.cost.predict import predict

    hardware = find_hardware(machine.gpu, "" if kernel == "auto" else kernel)
    windows = shape.windows or (None,) * shape.num_layers
    recomputed = min(setup.recomputed, shape.num_layers)
    total = 0.0
    for window in set(windows):
        of_window = {"heads": shape.num_heads // setup.tp,
                     "kv_heads": max(1, shape.num_kv_heads // setup.tp),
                     "head_dim": shape.head_dim, "seq_len": setup.length, "world": setup.cp,
                     "gpus_per_host": max(1, machine.gpus_per_host // setup.tp),
                     "window": window, "batch": setup.micro_rows, "hardware": hardware}
        strategy = _strategy(setup)
        layers = [i for i, own in enumerate(windows) if own == window]
        again = sum(setup.kept_attention <= i < recomputed for i in layers)
        total += len(layers) * predict(strategy, **of_window).seconds
        total += again * predict(strategy, **of_window, backward=False).seconds
    return total / _head_rate(shape)


def _head_rate(shape: ModelShape) -> float:
    """Share of attention's rates, which are those of heads of 128 channels, that narrow ones reach:
    386 TFLOP/s on 1M tokens with 64 channels (docs/results/evaluation/prefill-h100.md).
    """
    return _NARROW_RATE if shape.head_dim <= _NARROW_HEAD else 1.0


def _strategy(setup: Setup) -> str:
    return "ring" if setup.cp == 1 or setup.strategy == "auto" else setup.strategy


def _traffic(shape: ModelShape, setup: Setup) -> float:
    """Bytes that one process must move in one micro step, matrix products left out."""
    hidden, tp = shape.hidden, setup.tp
    q, k, inner = shape.q_width / tp, shape.kv_width / tp, shape.active_inner / tp
    if setup.compiled:  # every stretch reads its inputs and writes its outputs once
        forward = (shape.num_norms * 4 * hidden + 4 * (q + k)
                   + VALUE * shape.num_matrices * inner)
        forward += _residuals(shape, q, k)
    else:
        forward = _plain_forward(shape, q, k, inner)
    again = min(setup.recomputed, shape.num_layers) / shape.num_layers
    layers = shape.num_layers * (3 + again) * forward * setup.tokens
    vocab = shape.vocab / tp
    loss = setup.tokens * vocab * 30 + (setup.tokens / setup.loss_chunk) * vocab * hidden * 10
    gathered = shape.parameters / tp * 20 if setup.dp * setup.cp > 1 else 0.0
    return layers + loss + gathered


def _plain_forward(shape: ModelShape, q: float, k: float, inner: float) -> float:
    """Bytes a token that a layer moves where every operator reads and writes, norms in fp32."""
    return (shape.num_norms * 20 * shape.hidden + 12 * (q + k) + 8 * inner
            + _residuals(shape, q, k))


def _residuals(shape: ModelShape, q: float, k: float) -> float:
    """Bytes a token of residuals, and of keys on their way to others."""
    return 2 * 6 * shape.hidden + 4 * (q + 2 * k)


def _communication(shape: ModelShape, setup: Setup, machine: Machine, busy: float) -> float:
    """Gathers and reductions that nothing hides: those of embedding and head, and what of the
    layers' takes longer than a layer computes.
    """
    from extend.ring.cost.hardware import find_hardware

    hardware = find_hardware(machine.gpu)
    shards = setup.shards
    if shards == 1 and setup.replicas == 1:
        return 0.0
    link = hardware.nccl if shards * setup.tp <= machine.gpus_per_host else hardware.inter
    share = (shards - 1) / max(1, shards)
    counts = count_parameters(shape, setup)
    trained_share = counts.trained_layer / counts.layer
    each = (2 * VALUE + _FP32 * trained_share) * share
    each += 2 * _FP32 * trained_share / shards * (setup.replicas > 1)  # sums over the replicas
    layers = setup.micro_steps * shape.num_layers * counts.layer * each / link.bandwidth
    root = setup.micro_steps * counts.root * each / link.bandwidth
    reduced = 0.0
    if setup.tp > 1:  # two sums of a layer's output forward, two backward, nothing beside them
        sums = 4 * VALUE * shape.hidden * setup.tokens * 2 * (setup.tp - 1) / setup.tp
        reduced = setup.micro_steps * shape.num_layers * sums / hardware.nccl.bandwidth
    return root + max(0.0, layers - busy) + 0.3 * min(layers, busy) + reduced


def _host(setup: Setup, memory: MemoryPlan, rates: GpuRates, busy: float) -> float:
    copies = 2 * setup.micro_steps * memory.host_bytes / rates.host_link
    return rates.host_steal * min(copies, busy) + max(0.0, copies - busy)


def _optimizer(shape: ModelShape, setup: Setup, memory: MemoryPlan, rates: GpuRates) -> float:
    counts = count_parameters(shape, setup)
    trained = (counts.trained_root + shape.num_layers * counts.trained_layer) / setup.shards
    if setup.optimizer == "adamw-offload":
        processes = max(1, setup.world // setup.hosts)
        moved = trained * 10 * setup.weight_bytes
        return moved * processes / _OFFLOAD_BANDWIDTH + memory.host_state_bytes / rates.host_link
    return trained * 10 * setup.weight_bytes / rates.traffic

