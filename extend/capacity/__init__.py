"""What a training step takes: memory, time, and which layout, from a model's config alone.

Plain arithmetic that imports no torch.
"""

from extend.capacity.memory import MemoryPlan, Moment, plan_memory
from extend.capacity.planner import CapacityPlan, Wish, choose_plan
from extend.capacity.rates import GPUS, GpuRates, gpu_rates
from extend.capacity.recompute import choose_recomputed_layers, least_recomputed, phase_setup
from extend.capacity.seconds import TimePlan, plan_time, prefill_seconds
from extend.capacity.setup import GIB, Machine, Setup
from extend.capacity.shape import ModelShape, model_shape

__all__ = ["GIB", "GPUS", "CapacityPlan", "GpuRates", "Machine", "MemoryPlan", "ModelShape",
           "Moment", "Setup", "TimePlan", "Wish", "choose_plan", "choose_recomputed_layers",
           "gpu_rates", "least_recomputed", "model_shape", "phase_setup", "plan_memory",
           "plan_time", "prefill_seconds"]
