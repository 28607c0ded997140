"""The part of a plan that needs a machine: layout, memory and time of a training step."""

from typing import Any

from extend.capacity import (
    GIB,
    CapacityPlan,
    Machine,
    Wish,
    choose_plan,
    gpu_rates,
    model_shape,
)
from extend.errors import RecipeError
from extend.model_config import ModelConfig


def plan_capacity(config: ModelConfig | None, target_len: int, *, gpus: int, gpu: str = "h200",
                  gpu_memory: int | None = None, host_memory: int = 0, hosts: int = 1,
                  rows: int | None = None, trained: str = "all", weight_dtype: str = "float32",
                  optimizer: str = "adamw", kernel: str = "auto") -> CapacityPlan:
    """Choose how to train a model on rows of `target_len` tokens.

    Args:
        gpus: of all hosts together.
        gpu: their kind, a key of `extend.capacity.GPUS`.
        gpu_memory: bytes of one GPU; None: that of its kind.
        host_memory: bytes of one host that training may use.
        rows: of an optimizer step; None: as many as are fastest.
        trained: "all", "lora" or "lora+" (adapters, norms and embeddings).

    Raises:
        RecipeError: no model, an unknown GPU, or GPUs that do not divide over the hosts.
    """
    if config is None:
        raise RecipeError("plan: --gpus needs a model; --head-dim alone does not say how large "
                          "it is")
    memory = int(gpu_rates(gpu).memory_gib * GIB) if gpu_memory is None else gpu_memory
    machine = Machine(gpu=gpu.lower(), num_gpus=gpus, hosts=hosts, gpu_memory_bytes=memory,
                      host_memory_bytes=host_memory)
    wish = Wish(length=target_len, batch_rows=rows, trained=trained, optimizer=optimizer,
                weight_bytes=4 if weight_dtype == "float32" else 2, kernel=kernel)
    return choose_plan(model_shape(config), machine, wish)


def capacity_json(plan: CapacityPlan | None) -> dict[str, Any]:
    """The keys `memory`, `parallel` and `time`; None without a machine."""
    if plan is None:
        return dict.fromkeys(("memory", "parallel", "time"))
    return {"memory": _memory_json(plan), "parallel": _parallel_json(plan),
            "time": _time_json(plan)}


def _memory_json(plan: CapacityPlan) -> dict[str, Any]:
    memory = plan.memory
    return {
        "fits": plan.fits, "device_peak_bytes": round(memory.device_bytes),
        "device_peak_at": memory.peak.name,
        "device_parts_bytes": {name: round(size) for name, size in memory.peak.parts.items()},
        "device_shared_buffers_bytes": round(memory.outside_bytes),
        "device_usable_bytes": round(plan.usable_bytes),
        "device_missing_bytes": max(0, round(plan.needed_bytes - plan.usable_bytes)),
        "host_bytes": round(plan.host_bytes), "host_usable_bytes": plan.machine.host_memory_bytes,
        "nearest": plan.nearest or None, "parameters": plan.shape.parameters}


def _parallel_json(plan: CapacityPlan) -> dict[str, Any]:
    setup = plan.setup
    return {"gpus": plan.machine.num_gpus, "hosts": plan.machine.hosts, "data": setup.dp,
            "context": setup.cp, "tensor": setup.tp, "replicas": setup.replicas,
            "shards": setup.shards, "rows_at_once": setup.micro_rows,
            "micro_steps": setup.micro_steps, "recipe": plan.recipe()}


def _time_json(plan: CapacityPlan) -> dict[str, Any]:
    time = plan.time
    return {"step_seconds": time.seconds,
            "step_seconds_range": [time.seconds * (1 - time.spread),
                                   time.seconds * (1 + time.spread)],
            "parts_seconds": dict(time.parts), "tokens_per_step": time.tokens,
            "tokens_per_second": time.tokens_per_second, "mfu": time.mfu,
            "gpu": plan.rates.name, "rates_source": plan.rates.source}


def capacity_tables(plan: CapacityPlan) -> str:
    """For a terminal: the answer, recipe keys, memory at the peak, seconds."""
    return "\n\n".join([_answer(plan), _recipe_text(plan), _memory_table(plan), _time_table(plan)])


def _answer(plan: CapacityPlan) -> str:
    setup, machine = plan.setup, plan.machine
    rows = f"{setup.batch_rows} row" + "s" * (setup.batch_rows > 1)
    where = f"{machine.num_gpus} x {plan.rates.name}" + (
        f" in {machine.hosts} hosts" if machine.hosts > 1 else "")
    if plan.fits:
        time = plan.time
        return (f"training at {setup.length:,} tokens on {where}: {time.seconds:.1f} s a step of "
                f"{rows} (+- {time.spread:.0%}), {time.tokens_per_second:,.0f} tokens/s, MFU "
                f"{time.mfu:.1%}, {_gib(plan.needed_bytes)} of {_gib(plan.usable_bytes)} GiB a GPU")
    lines = [f"training at {setup.length:,} tokens does not fit on {where}: it needs "
             f"{_gib(plan.needed_bytes)} GiB a GPU of which {_gib(plan.usable_bytes)} may be used"]
    if plan.host_bytes > machine.host_memory_bytes:
        lines.append(f"and {_gib(plan.host_bytes)} GiB of host memory of "
                     f"{_gib(machine.host_memory_bytes)}")
    length, gpus = plan.nearest.get("length"), plan.nearest.get("gpus")
    near = [f"{length:,} tokens on this machine"] if length else []
    near += [f"{gpus} GPUs for this length"] if gpus else []
    lines.append("the nearest that fits: " + (", or ".join(near) or "none that was looked at"))
    return "; ".join(lines)


def _recipe_text(plan: CapacityPlan) -> str:
    lines = [f"  {key}: {_yaml(value)}" for key, value in plan.recipe().items()]
    return "\n".join(["train:", *lines])


def _yaml(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[{" + ", ".join(f"{key}: {item}" for key, item in value[0].items()) + "}]"
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) \
        if value is None or isinstance(value, bool) else str(value)


def _memory_table(plan: CapacityPlan) -> str:
    peak = plan.memory.peak
    lines = [f"GiB of a GPU at the peak, {peak.name}"]
    rows = [*peak.parts.items(), ("buffers shared between GPUs", plan.memory.outside_bytes)]
    lines += [f"  {name:<32}{_gib(size):>9}" for name, size in rows if size >= 0.005 * GIB]
    if plan.host_bytes:
        lines.append(f"  {'of a host, page-locked':<32}{_gib(plan.host_bytes):>9}")
    return "\n".join(lines)


def _time_table(plan: CapacityPlan) -> str:
    lines = ["seconds of a step"]
    lines += [f"  {name:<32}{seconds:>9.2f}" for name, seconds in plan.time.parts.items()
              if seconds >= 0.005]
    return "\n".join([*lines, f"rates of {plan.rates.name}: {plan.rates.source}"])


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
