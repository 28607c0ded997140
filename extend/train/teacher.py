"""The model that rows with `distill` are taught by, beside the one that is trained."""

from extend.checkpoint import Checkpoint
from extend.errors import CompatibilityError
from extend.model_config import ModelConfig, read_config
from extend.train.memory import tile_layers
from extend.train.mesh import Processes, longest_local
from extend.train.model import CausalLoss, build_model
from extend.train.precision import compute_dtype
from extend.train.shard import shard_model
from extend.train.weights import fill_weights
from extend.train_options import TrainOptions


def teacher_config(options: TrainOptions, config: ModelConfig) -> ModelConfig:
    """That of the teacher: `config`, of the model that the run begins with, unless it has another.
    """
    return config if options.teacher is None else read_config(options.teacher)


def check_teacher(options: TrainOptions, config: ModelConfig) -> None:
    """Check that a teacher of its own has the model's vocabulary.

    Raises:
        CompatibilityError: it has not.
        CheckpointError: there is none.
    """
    if options.teacher is None:
        return
    Checkpoint(options.teacher)
    theirs = teacher_config(options, config).vocab_size
    if theirs != config.vocab_size:
        raise CompatibilityError(f"teacher {options.teacher} has {theirs} tokens, but "
                                 f"{options.model} has {config.vocab_size}; give a teacher with "
                                 "the same tokenizer")


def load_teacher(options: TrainOptions, config: ModelConfig, processes: Processes) -> CausalLoss:
    """The teacher with its own weights and RoPE, in the dtype that layers compute in.

    It is sharded like the trained model, and nothing of it is trained.

    Raises:
        CompatibilityError, CheckpointError: as `build_model` and `fill_weights`.
    """
    frozen = options.model_copy(update={
        "model": options.teacher or options.model, "mode": "full", "trainable": [],
        "trained_beside": [], "linear_dtype": "compute", "optimizer": "adamw",
        "weight_dtype": str(compute_dtype(options)).removeprefix("torch.")})
    model = build_model(frozen, teacher_config(options, config)).requires_grad_(False).eval()
    tile_layers(model, options, longest_local(options, processes.world))
    module = shard_model(CausalLoss(model, options.loss_chunk), processes, frozen)
    fill_weights(model, Checkpoint(frozen.model))
    return module.eval()
