"""The model that a run begins with, beside the one that is trained, for rows with `distill`."""

from extend.checkpoint import Checkpoint
from extend.model_config import ModelConfig
from extend.train.memory import tile_layers
from extend.train.mesh import Processes, longest_local
from extend.train.model import CausalLoss, build_model
from extend.train.precision import compute_dtype
from extend.train.shard import shard_model
from extend.train.weights import fill_weights
from extend.train_options import TrainOptions


def load_teacher(options: TrainOptions, config: ModelConfig, processes: Processes) -> CausalLoss:
    """The model with its own weights and its own RoPE, in the dtype that layers compute in.

    It is sharded like the trained one, and nothing of it is trained.

    Raises:
        CompatibilityError, CheckpointError: as `build_model` and `fill_weights`.
    """
    frozen = options.model_copy(update={
        "mode": "full", "trainable": [], "trained_beside": [], "linear_dtype": "compute",
        "optimizer": "adamw", "weight_dtype": str(compute_dtype(options)).removeprefix("torch.")})
    model = build_model(frozen, config).requires_grad_(False).eval()
    tile_layers(model, options, longest_local(options, processes.world))
    module = shard_model(CausalLoss(model, options.loss_chunk), processes, frozen)
    fill_weights(model, Checkpoint(options.model))
    return module.eval()
