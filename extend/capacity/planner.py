"""The fastest way to train a model at a length on a machine, or what is missing for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import gcd
from typing import Any

from extend.capacity.memory import MemoryPlan, plan_memory
from extend.capacity.rates import GpuRates, gpu_rates
from extend.capacity.recompute import USABLE_FRAC
from extend.capacity.seconds import TimePlan, plan_time
from extend.capacity.setup import Machine, Setup, auto_tile
from extend.capacity.shape import ModelShape
from extend.errors import RecipeError

HOST_FRAC = 0.9
"""Of a host's memory, what layers' tensors and offloaded state may fill."""
_MICRO_TOKENS = 8192

# What is given up, step by step, where nothing fits: each changes what is trained or its rounding.
CONCESSIONS: tuple[dict[str, Any], ...] = (
    {}, {"weight_bytes": 2}, {"weight_bytes": 2, "kept_form": "fp8"},
    {"weight_bytes": 2, "trained": "lora+"},
    {"weight_bytes": 2, "trained": "lora+", "kept_form": "fp8"})


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be trained.

    Attributes:
        batch_rows: of a step; None: as many as are fastest.
        weight_bytes, trained, optimizer: as in Setup.
        kernel: of attention; auto: that of ring/cost for the GPU.
    """

    length: int
    batch_rows: int | None = None
    weight_bytes: int = 4
    trained: str = "all"
    optimizer: str = "adamw"
    kernel: str = "auto"


@dataclass(frozen=True)
class CapacityPlan:
    """An answer.

    Attributes:
        fits: whether `setup` fits; if not it is the one that needs least.
        nearest: where it does not: "length" and "gpus" that do, where there are such.
    """

    shape: ModelShape
    machine: Machine
    wish: Wish
    setup: Setup
    memory: MemoryPlan
    fits: bool
    nearest: dict[str, int | None]

    @property
    def rates(self) -> GpuRates:
        return gpu_rates(self.machine.gpu)

    @cached_property
    def time(self) -> TimePlan:
        return plan_time(self.shape, self.setup, self.machine, self.rates, self.wish.kernel)

    @property
    def usable_bytes(self) -> float:
        return USABLE_FRAC * self.machine.gpu_memory_bytes

    @property
    def needed_bytes(self) -> float:
        """Of a device."""
        return self.memory.device_bytes + self.memory.outside_bytes

    @property
    def host_bytes(self) -> float:
        """Of a host, all its processes together."""
        return (self.memory.host_bytes + self.memory.host_state_bytes) * self.machine.gpus_per_host

    def recipe(self) -> dict[str, Any]:
        """Keys of a recipe's `train` that say the same; those of its phase under `schedule`."""
        setup = self.setup
        keys: dict[str, Any] = {
            "mode": "full" if setup.trained == "all" else "lora",
            "weight_dtype": "float32" if setup.weight_bytes == 4 else "bfloat16",
            "recomputed_layers": min(setup.recomputed, self.shape.num_layers),
            "kept_attention": ("all" if setup.kept_attention >= setup.recomputed
                               else setup.kept_attention),
            "host_memory": setup.host_bytes, "kept_form": setup.kept_form,
            "tile_tokens": setup.tile, "strategy": setup.strategy, "nproc": self.machine.num_gpus}
        if setup.trained == "lora+":
            keys["trained_beside"] = ["norms", "embeddings"]
        if setup.tp > 1:
            keys["tensor_parallel"] = setup.tp
        if setup.replicas > 1:
            keys["shard_over"] = setup.shards
        if setup.optimizer != "adamw":
            keys["optimizer"] = setup.optimizer
        phase = {"length": setup.length, "batch_rows": setup.batch_rows}
        if setup.dp < gcd(setup.batch_rows, setup.dp * setup.cp):
            phase["context_parallel"] = setup.cp
        keys["schedule"] = [phase]
        return keys


def choose_plan(shape: ModelShape, machine: Machine, wish: Wish) -> CapacityPlan:
    """The fastest setup that fits; else the one that needs least, and the nearest that fits.

    Concessions (bf16 weights, 8-bit inputs, adapters in place of all weights) are made in that
    order, and only where nothing fits without.

    Raises:
        RecipeError: a length that no layout divides.
    """
    found = _fitting(shape, machine, wish)
    if found is not None:
        return found
    least = min((_plan(shape, machine, wish, setup)
                 for setup in _setups(shape, machine, _conceded(wish, CONCESSIONS[-1]),
                                      CONCESSIONS[-1])),
                key=lambda plan: plan.needed_bytes, default=None)
    if least is None:
        raise RecipeError(f"plan: {wish.length} tokens do not divide over {machine.num_gpus} GPUs "
                          "(two pieces for each that shares a row); choose a length that is a "
                          "multiple of twice their number")
    return replace(least, nearest={"length": _longest(shape, machine, wish),
                                   "gpus": _fewest(shape, machine, wish)})


def _conceded(wish: Wish, concession: dict[str, Any]) -> Wish:
    """The wish with what it does not ask for itself given up."""
    changes = {key: value for key, value in concession.items() if key != "kept_form"}
    return replace(wish, **changes)


def _fitting(shape: ModelShape, machine: Machine, wish: Wish) -> CapacityPlan | None:
    for concession in CONCESSIONS:
        if concession.get("trained") and wish.trained != "all":
            continue
        plans = [_plan(shape, machine, wish, setup)
                 for setup in _setups(shape, machine, _conceded(wish, concession), concession)]
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            return max(fitting, key=_worth)
    return None


def _worth(plan: CapacityPlan) -> tuple[float, int]:
    """Tokens a second; among equal ones the fewest rows."""
    return plan.time.tokens_per_second, -plan.setup.batch_rows


def _plan(shape: ModelShape, machine: Machine, wish: Wish, setup: Setup) -> CapacityPlan:
    """`setup` with as few recomputed layers as fit; with all of them if not even those do."""
    usable = USABLE_FRAC * machine.gpu_memory_bytes

    def needed(layers: int) -> float:
        memory = plan_memory(shape, setup.with_recomputed(layers))
        return memory.device_bytes + memory.outside_bytes

    low, high = 0, shape.num_layers
    while low < high:  # needs fall with every layer that is computed again
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= usable else (middle + 1, high)
    chosen = setup.with_recomputed(low)
    memory = plan_memory(shape, chosen)
    host = (memory.host_bytes + memory.host_state_bytes) * machine.gpus_per_host
    fits = (memory.device_bytes + memory.outside_bytes <= usable
            and host <= machine.host_memory_bytes)
    return CapacityPlan(shape, machine, wish, chosen, memory, fits, {})


def _setups(shape: ModelShape, machine: Machine, wish: Wish,
            concession: dict[str, Any]) -> Iterator[Setup]:
    """All that may be chosen from, but for the number of recomputed layers."""
    hosts_budget = int(HOST_FRAC * machine.host_memory_bytes)
    if wish.optimizer == "adamw-offload":
        hosts_budget = 0
    budgets = sorted({0, hosts_budget})
    for tp, rows, replicas in product(_degrees(shape, machine), _rows(machine, wish),
                                      sorted({1, machine.hosts})):
        ranks = machine.num_gpus // tp
        for dp, host, kept in product(_groups(rows, ranks, wish), budgets, _kept(shape)):
            cp = ranks // dp
            if wish.length % (2 * cp if cp > 1 else 1) or ranks % replicas:
                continue
            micro = min(rows // dp, max(1, _MICRO_TOKENS * cp // wish.length))
            for strategy in _strategies(shape, cp, tp):
                yield Setup(
                    length=wish.length, batch_rows=rows, dp=dp, cp=cp, tp=tp, replicas=replicas,
                    hosts=machine.hosts, micro_rows=micro, recomputed=shape.num_layers,
                    kept_attention=kept, host_bytes=host,
                    kept_form=concession.get("kept_form", "exact"),
                    tile=auto_tile(wish.length // cp), weight_bytes=wish.weight_bytes,
                    trained=wish.trained, optimizer=wish.optimizer, strategy=strategy)


def _groups(rows: int, ranks: int, wish: Wish) -> list[int]:
    """Groups that rows are dealt to: as many as divide both; fewer where the rows were asked for,
    so that more processes share each and rows follow one another.
    """
    least = [1] if wish.batch_rows is None else [
        n for n in range(1, ranks + 1) if ranks % n == 0]
    return sorted({gcd(rows, ranks // n) for n in least})


def _degrees(shape: ModelShape, machine: Machine) -> list[int]:
    """Degrees of tensor parallelism: inside a host, and dividing heads and channels."""
    return [n for n in (1, 2, 4, 8) if machine.gpus_per_host % n == 0
            and not any(size % n for size in (shape.num_heads, shape.num_kv_heads,
                                              shape.dense_inner, shape.vocab))
            and (n == 1 or not shape.num_experts)]


def _rows(machine: Machine, wish: Wish) -> list[int]:
    """Rows of a step: as wished, or one for each group of some division of the GPUs."""
    if wish.batch_rows is not None:
        return [wish.batch_rows]
    return [n for n in range(1, machine.num_gpus + 1) if machine.num_gpus % n == 0]


def _kept(shape: ModelShape) -> list[int]:
    """Layers that may keep their attention, from all to none in quarters."""
    return sorted({shape.num_layers * part // 4 for part in range(5)}, reverse=True)


def _strategies(shape: ModelShape, cp: int, tp: int) -> list[str]:
    if cp == 1:
        return ["auto"]
    return ["ring"] + ["ulysses"] * (shape.num_heads // tp % cp == 0)


def _longest(shape: ModelShape, machine: Machine, wish: Wish) -> int | None:
    """The longest row, in steps of 1024 tokens a GPU, that fits after all concessions."""
    step = 1024 * machine.num_gpus
    low, high = 0, wish.length // step
    while low < high:
        middle = (low + high + 1) // 2
        found = _fitting(shape, machine, replace(wish, length=middle * step))
        low, high = (middle, high) if found is not None else (low, middle - 1)
    return low * step or None


def _fewest(shape: ModelShape, machine: Machine, wish: Wish) -> int | None:
    """The fewest GPUs, in hosts like this one where there are several, that fit; up to 1024."""
    gpus, per_host = machine.num_gpus, max(8, machine.gpus_per_host)
    while gpus < 1024:
        gpus *= 2
        hosts = max(machine.hosts, -(-gpus // per_host))
        larger = replace(machine, num_gpus=gpus, hosts=hosts)
        rows = wish.batch_rows
        if wish.length % (2 * gpus) == 0 and _fitting(shape, larger, replace(
                wish, batch_rows=1 if rows is None else rows)) is not None:
            return gpus
    return None
