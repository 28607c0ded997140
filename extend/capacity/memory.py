"""Bytes on a device at the fullest moment of a step, and on its host.

A step holds its shards of weights and moments throughout. On top of them come, by moment:

    head      end of the forward pass: all that layers keep; embedding and head gathered; logits of
              a chunk; in fp32 the whole gradient of the head
    backward  of each layer: what it and those before it keep, its gathered weights and the next
              one's on their way; gradients of those after it, sharded, and one of them in fp32 on
              its way to its shards
    end       gradients of embedding and head, whole and once more in fp32

Backward is largest at a layer's MLP, at its attention, or while a layer is computed again; all
three are counted, for the last two layers, the last one that is computed again, and the first two:
where what layers keep is on the host, backward is largest at its end, when gradients have gathered.

Source: FSDP2 (`torch.distributed.fsdp`) as `extend.train.shard` uses it, the loss of
`extend.train.loss` and the layers of `extend.train.memory`; held against a count of live bytes in
tests/capacity/test_memory.py, and against GPUs in docs/planning.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from extend.capacity.activations import (
    VALUE,
    LayerBytes,
    exchanges_heads,
    has_adapters,
    layer_bytes,
    makes_product,
    num_groups,
    tile_bytes,
)
from extend.capacity.parameters import count_parameters
from extend.capacity.setup import Setup
from extend.capacity.shape import ModelShape

CONTEXT_BYTES = 2 ** 26 + 2**22
"""Workspaces of cuBLAS and the like, in torch's allocator: what a model of 22.43 GiB held on an
H100 and an H200 between steps, less its tensors (0.07 GiB)."""
SMALLEST_BYTES = 2**20
"""Smaller tensors stay on the device; see `extend.train.memory.store`."""
_FP32 = 4


@dataclass(frozen=True)
class Moment:
    """One moment of a step, and bytes on a device by what they are for."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What a step needs.

    Attributes:
        moments: all that were counted.
        outside_bytes: of the device, beside torch's allocator: buffers that GPUs share.
        host_bytes: of one process, page-locked, for what layers keep.
        host_state_bytes: of one process, for weights, gradients and moments that are offloaded.
    """

    moments: tuple[Moment, ...]
    outside_bytes: float
    host_bytes: float
    host_state_bytes: float

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def device_bytes(self) -> float:
        """What `torch.cuda.max_memory_allocated` would say."""
        return self.peak.total


def plan_memory(shape: ModelShape, setup: Setup) -> MemoryPlan:
    """Bytes of a process at every moment that may be the fullest."""
    step = _Step(shape, setup)
    moments = (step.head(), *step.backward(), step.end(), step.update())
    return MemoryPlan(moments, step.outside_bytes(), step.kept.hosted_bytes, step.host_state())


class Kept:
    """What the recomputed layers keep, in order, and where: (bytes, on the host) of each layer.

    Items are placed as `extend.train.memory.store.Store` does: on the host as long as there is
    room for an item, small ones never.
    """

    def __init__(self, shape: ModelShape, setup: Setup, layer: LayerBytes):
        self._free, self.hosted_bytes = float(setup.host_share_bytes), 0.0
        self.leaving = 0.0  # what is sent last waits on the device until something else is
        fp8 = setup.kept_form == "fp8"
        # 8 bits a value, and one fp32 scale a token.
        held = setup.tokens * (layer.input / VALUE + _FP32 if fp8 else layer.input)
        lse = setup.tokens * _FP32 * shape.num_heads / setup.tp
        out = layer.attention * setup.tokens - lse
        self.device: list[float] = []
        self._hosted: list[float] = []
        for index in range(min(setup.recomputed, shape.num_layers)):
            items = [(held, True)]
            if index < setup.kept_attention:
                items += [(out, not fp8), (lse, not fp8)]
            stays = sum(size for size, may_go in items if not (may_go and self._host(size)))
            self.device.append(stays)
            self._hosted.append(sum(size for size, _ in items) - stays)

    def _host(self, size: float) -> bool:
        if size < SMALLEST_BYTES or self._free < size:
            return False
        self._free -= size
        self.hosted_bytes += size
        self.leaving = size
        return True

    def below(self, layer: int) -> float:
        """On the device, of all layers before `layer`."""
        return sum(self.device[:layer])

    def fetched(self, layer: int) -> float:
        """Of the layer before `layer`, what is on its way back from the host."""
        return self._hosted[layer - 1] if 0 < layer <= len(self._hosted) else 0.0


class _Step:
    """The parts of which moments are made."""

    def __init__(self, shape: ModelShape, setup: Setup):
        self.shape, self.setup = shape, setup
        self.layer = layer_bytes(shape, setup)
        self.layer_again = layer_bytes(shape, setup, again=True)
        self.counts = count_parameters(shape, setup)
        self.kept = Kept(shape, setup, self.layer)
        # One process alone gathers only what it must cast or fetch from its host.
        casts = setup.weight_bytes != VALUE or setup.optimizer == "adamw-offload"
        self.is_sharded = setup.dp * setup.cp > 1 or casts
        self.gathers_frozen = setup.dp * setup.cp > 1 or setup.optimizer == "adamw-offload"
        self.recomputed = min(setup.recomputed, shape.num_layers)

    def fixed(self) -> dict[str, float]:
        """Weights, moments, and what is there between steps."""
        counts, setup = self.counts, self.setup
        layers = self.shape.num_layers
        total = counts.root + layers * counts.layer
        trained = counts.trained_root + layers * counts.trained_layer
        frozen = (total - trained) * VALUE
        weights, moments = trained * setup.weight_bytes + frozen, trained * self._moment_bytes()
        if setup.optimizer == "adamw-offload":
            weights = moments = 0.0
        parts = {"weights": weights / setup.shards, "optimizer": moments / setup.shards,
                 "workspaces": CONTEXT_BYTES}
        return parts | {"teacher": self._teacher()} if setup.teacher else parts

    def _teacher(self) -> float:
        """Its shards, and what is not in its layers, which stays gathered."""
        shape, setup = self.shape, self.setup
        root = shape.root_parameters if setup.dp * setup.cp > 1 else 0
        return VALUE * (shape.parameters / setup.shards + root) / setup.tp

    def _moment_bytes(self) -> float:
        """Of both moments of a parameter; 8 bits with one fp32 scale for 256 values."""
        if self.setup.optimizer == "adamw-8bit":
            return 2 * (1 + _FP32 / 256)
        return 2 * self.setup.weight_bytes

    def host_state(self) -> float:
        if self.setup.optimizer != "adamw-offload":
            return 0.0
        counts, layers = self.counts, self.shape.num_layers
        total = counts.root + layers * counts.layer
        trained = counts.trained_root + layers * counts.trained_layer
        each = 2 * self.setup.weight_bytes + self._moment_bytes()
        return (trained * each + (total - trained) * VALUE) / self.setup.shards

    def outside_bytes(self) -> float:
        """Two lanes of a block of keys and values that the GPUs of a ring share."""
        if self.setup.cp == 1:
            return 0.0
        block = 2 * VALUE * self.shape.kv_width / self.setup.tp * self.setup.tokens
        return 2 * block

    def _gathered_root(self) -> float:
        return self._gathered(self.counts.root, self.counts.trained_root)

    def _gathered_layer(self) -> float:
        return self._gathered(self.counts.layer, self.counts.trained_layer)

    def _gathered(self, all_parameters: float, trained: float) -> float:
        if not self.is_sharded:
            return 0.0
        return VALUE * (all_parameters if self.gathers_frozen else trained)

    def _gradient_bytes(self, layers: int) -> float:
        """Sharded gradients of so many layers."""
        if self.setup.optimizer == "adamw-offload":
            return 0.0
        return (layers * self.counts.trained_layer * self.setup.weight_bytes
                / self.setup.shards)

    def _rotations(self) -> float:
        """cos and sin of every token."""
        return 2 * VALUE * self.shape.head_dim * self.setup.tokens

    def _whole_layers(self, count: int) -> float:
        return count * self.layer.saved * self.setup.tokens

    def head(self) -> Moment:
        shape, setup = self.shape, self.setup
        vocab = shape.vocab / setup.tp
        chunk = min(setup.loss_chunk, setup.tokens)
        # As the product gives them, in fp32, and their gradient; or, after them, what the backward
        # of a plain last norm takes.
        plain = not setup.compiled and not setup.used_tile
        logits = max(chunk * vocab * (VALUE + _FP32 + VALUE),
                     3 * _FP32 * shape.hidden * setup.tokens * plain)
        hidden = VALUE * shape.hidden * setup.tokens
        head = vocab * shape.hidden
        return Moment("head", self.fixed() | {
            "gathered weights": self._gathered_root() + self._gathered_layer(),
            "kept by layers": self.kept.below(self.recomputed) + self.kept.leaving,
            "whole layers": self._whole_layers(shape.num_layers - self.recomputed),
            "logits": logits, "gradient of the head": head * _FP32 * self.counts.head_trains,
            "last norm": self._last_norm(), "gradient of hidden states": hidden,
            "hidden states of the teacher": hidden * setup.teacher,
            "rotations": self._rotations()})

    def _last_norm(self) -> float:
        """What the last norm saves, and its output."""
        hidden = self.shape.hidden
        plain = not self.setup.compiled and not self.setup.used_tile
        trains = self.setup.trained != "lora"
        own = (_FP32 + VALUE * trains) * hidden if plain else VALUE * hidden
        return (own + VALUE * hidden) * self.setup.tokens

    def backward(self) -> Iterator[Moment]:
        count = self.shape.num_layers
        layers = {0, 1, self.recomputed - 1, count - 2, count - 1}
        for index in sorted(index for index in layers if 0 <= index < count):
            base = self._backward_parts(index)
            for name, own in self._own(index).items():
                yield Moment(f"backward of layer {index + 1}, {name}", base | {"this layer": own})

    def _backward_parts(self, index: int) -> dict[str, float]:
        counts, shape, setup = self.counts, self.shape, self.setup
        after = shape.num_layers - 1 - index
        gathered = self._gathered_root() + self._gathered_layer() * (2 if index else 1)
        reducing = _FP32 * counts.trained_layer if after and self.is_sharded else 0.0
        whole = max(0, index - self.recomputed)
        # Until one that is computed again takes its own, what was sent last waits on the device.
        fetched = self.kept.fetched(index) if index < self.recomputed else self.kept.leaving
        return self.fixed() | {
            "gathered weights": gathered,
            "kept by layers": self.kept.below(min(index, self.recomputed)) + fetched,
            "whole layers": self._whole_layers(whole),
            "gradients of layers": self._gradient_bytes(after) + reducing,
            "gradient of the head": VALUE * shape.embedding / setup.tp * counts.head_trains,
            "rotations": self._rotations()}

    def _own(self, index: int) -> dict[str, float]:
        """Bytes of the layer that computes: by what it computes."""
        setup, again = self.setup, index < self.recomputed
        layer = self.layer_again if again else self.layer
        held = layer.recomputed if again else layer.saved
        mlp = tile_bytes(self.shape, setup)
        if setup.trained == "all" and not setup.used_tile and not makes_product(
                self.shape, setup, again):
            mlp += VALUE * self.counts.layer * _down_share(self.shape)  # its gradient, by then
        attention = layer.attention_backward * setup.tokens + self._exchanged()
        if setup.trained == "all":
            attention += VALUE * self.shape.mlp_matrix / setup.tp
        found = {"MLP": (held + layer.mlp_extra) * setup.tokens + mlp, "attention": attention}
        if again:
            found["computed again"] = (
                layer.rotation + (layer.attention if index < setup.kept_attention else 0)
            ) * setup.tokens
        return found

    def _exchanged(self) -> float:
        """What attention's backward holds beside its inputs and outputs: the kernel's fp32 sum of
        dq, or of some heads at a time with their gradients; of a ring the keys of other ranks and
        the shares of their gradients; of an exchange of heads dout of its own heads, and gradients
        on their way back. After the kernel compiled code has gradients before and after they are
        turned back (512K tokens on an H200; adapters: of k and v once more).
        """
        from extend.ring.groups import num_head_groups  # its package needs torch

        shape, setup = self.shape, self.setup
        q, k = shape.q_width / setup.tp, shape.kv_width / setup.tp
        own = _FP32 * q
        count = num_head_groups(int(shape.num_kv_heads // setup.tp) or 1, q * setup.tokens)
        if count > 1 and not exchanges_heads(setup):
            own = (own + VALUE * (q + 2 * k)) / count
        if exchanges_heads(setup):
            own = own / num_groups(shape, setup) + VALUE * (2 * q + 2 * k)
        elif setup.cp > 1:
            block = 2 * VALUE * k
            own += 3 * block + VALUE * q + (_FP32 * q + 2 * _FP32 * k if setup.cp > 2 else 0)
        turned = VALUE * (q + 2 * k * (1 + has_adapters(setup))) * setup.compiled
        return max(own, turned) * setup.tokens

    def end(self) -> Moment:
        counts = self.counts
        parts = {"gradients of layers": self._gradient_bytes(self.shape.num_layers)}
        root = counts.trained_root
        parts["gradients of embedding and head"] = VALUE * root
        if self.is_sharded:
            parts["reduced"] = _FP32 * (root + counts.trained_layer)
        return Moment("end of backward", self.fixed() | parts)

    def update(self) -> Moment:
        counts = self.counts
        root = counts.trained_root * self.setup.weight_bytes / self.setup.shards
        if self.setup.optimizer == "adamw-offload":
            root = 0.0
        return Moment("update", self.fixed() | {
            "gradients": self._gradient_bytes(self.shape.num_layers) + root})


def _down_share(shape: ModelShape) -> float:
    """The last matrix of a dense MLP as a share of the layer; of experts all are gathered."""
    return shape.mlp_matrix / shape.num_matrices / shape.layer_parameters
