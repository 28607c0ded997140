"""How many parameters a process has before they are sharded, and how many of them are trained."""

from dataclasses import dataclass

from extend.capacity.setup import Setup
from extend.capacity.shape import ModelShape


@dataclass(frozen=True)
class Parameters:
    """Parameters of one process before sharding: of a layer and of the rest, all and trained."""

    layer: float
    root: float
    trained_layer: float
    trained_root: float
    head_trains: bool


def count_parameters(shape: ModelShape, setup: Setup) -> Parameters:
    layer, root = shape.layer_parameters / setup.tp, shape.root_parameters / setup.tp
    adapters = setup.lora_rank * _adapter_width(shape) / setup.tp
    embedding, norms = shape.embedding / setup.tp, shape.norm_values
    head_trains = setup.trained == "all" or (shape.tied and setup.trained != "lora")
    if setup.trained == "all":
        return Parameters(layer, root, layer, root, head_trains)
    if setup.trained == "norms":
        return Parameters(layer, root, norms, embedding + shape.hidden, head_trains)
    layer += adapters
    if setup.trained == "lora":
        return Parameters(layer, root, adapters, 0.0, head_trains)
    return Parameters(layer, root, adapters + norms, embedding + shape.hidden, head_trains)


def _adapter_width(shape: ModelShape) -> float:
    """Inputs plus outputs of a layer's linear layers: parameters of adapters of rank 1."""
    attention = 4 * shape.hidden + 2 * shape.q_width + 2 * shape.kv_width
    return attention + shape.num_matrices * (shape.hidden + shape.dense_inner)
