"""Parameters, gradients and optimizer of a run, sharded over its processes."""

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from extend.train.mesh import Processes
from extend.train.model import CausalLoss
from extend.train.tensor_parallel import split_model
from extend.train.weights import place_module


def shard_model(module: CausalLoss, processes: Processes) -> CausalLoss:
    """Move to the device, and shard parameters, gradients and optimizer over all processes.

    Tensor parallelism comes first; what it leaves of each parameter is then sharded over the
    processes that hold the same part, once or in replicas.

    A module without values gets memory for its shards, without values; see `fill_weights`.

    Gradients are summed, not averaged: each token's weight already counts it in the whole step.
    """
    if processes.mesh is None:
        place_module(module, processes.device)
        return module
    if processes.tp_mesh is not None:
        split_model(module.model, processes.tp_mesh)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    sharded = [*module.model.get_decoder().layers, module]
    for part in sharded:
        fully_shard(part, mesh=processes.data_mesh, mp_policy=policy)
    for part in sharded:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    place_module(module, processes.device)
    return module
