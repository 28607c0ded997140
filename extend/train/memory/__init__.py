"""What a step keeps between forward and backward, and where."""

from extend.train.memory.layers import LayerMemory, checkpoint_layers, make_memory, tile_layers
from extend.train.memory.store import Store

__all__ = ["LayerMemory", "Store", "checkpoint_layers", "make_memory", "tile_layers"]
