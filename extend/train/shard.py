"""Parameters, gradients and optimizer of a run, sharded over its processes."""

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from extend.train.mesh import Processes
from extend.train.model import CausalLoss
from extend.train.tensor_parallel import split_model


def shard_model(module: CausalLoss, processes: Processes) -> CausalLoss:
    """Move to the device, and shard parameters, gradients and optimizer over all processes.

    Tensor parallelism comes first; what it leaves of each parameter is then sharded over the
    processes that hold the same part, once or in replicas.

    Gradients are summed, not averaged: each token's weight already counts it in the whole step.
    """
    if processes.mesh is None:
        return _place(module, processes.device)
    if processes.tp_mesh is not None:
        split_model(module.model, processes.tp_mesh)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    sharded = [*module.model.get_decoder().layers, module]
    for part in sharded:
        fully_shard(part, mesh=processes.data_mesh, mp_policy=policy)
    for part in sharded:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    return _place(module, processes.device)


def _place(module: CausalLoss, device: torch.device) -> CausalLoss:
    """On the device; a module without values yet gets memory for them there."""
    if any(p.is_meta for p in module.parameters()):
        return module.to_empty(device=device)
    return module.to(device)
