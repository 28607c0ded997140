"""Parameters, gradients and optimizer of a run, sharded over its processes."""

import torch
from torch.distributed.fsdp import fully_shard

from extend.train.mesh import Processes, mesh_of_one
from extend.train.model import CausalLoss
from extend.train.precision import needs_sharding, sharding_policies
from extend.train.tensor_parallel import split_model
from extend.train.weights import place_module
from extend.train_options import TrainOptions


def shard_model(module: CausalLoss, processes: Processes, options: TrainOptions) -> CausalLoss:
    """Move to the device, and shard parameters, gradients and optimizer over all processes.

    Tensor parallelism comes first; what it leaves of each parameter is then sharded over the
    processes that hold the same part, once or in replicas.

    A module without values gets memory for its shards, without values; see `fill_weights`.

    Gradients are summed, not averaged: each token's weight already counts it in the whole step.
    """
    mesh, whole = processes.data_mesh, None
    if mesh is None:
        if not needs_sharding(options):
            place_module(module, processes.device)
            return module
        mesh = mesh_of_one(processes.device)
        if options.optimizer != "adamw-offload":  # gathering would be a copy for nothing
            whole = {p for p in module.parameters() if not p.requires_grad}
    if processes.tp_mesh is not None:
        split_model(module.model, processes.tp_mesh)
    policies = sharding_policies(options, processes.device)
    sharded = [*module.model.get_decoder().layers, module]
    for part in sharded:
        fully_shard(part, mesh=mesh, ignored_params=whole, **policies)
    for part in sharded:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    if "offload_policy" not in policies:
        place_module(module, processes.device)
        return module
    place_module(module, torch.device("cpu"))
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(processes.device))
    return module
