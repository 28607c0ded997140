"""What a training step takes: memory, time, and which layout, from a model's config alone.

Plain arithmetic that imports no torch.
"""

from extend.capacity.memory import MemoryPlan, Moment, plan_memory
from extend.capacity.recompute import choose_recomputed_layers, least_recomputed, phase_setup
from extend.capacity.setup import GIB, Machine, Setup
from extend.capacity.shape import ModelShape, model_shape

__all__ = ["GIB", "Machine", "MemoryPlan", "ModelShape", "Moment", "Setup",
           "choose_recomputed_layers", "least_recomputed", "model_shape", "phase_setup",
           "plan_memory"]
