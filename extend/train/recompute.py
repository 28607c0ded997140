"""How layers compute, and what they keep until their backward."""

import logging

import torch
from transformers import PreTrainedModel

from extend.capacity import choose_recomputed_layers
from extend.model_config import ModelConfig
from extend.train.compiled import compile_layers, compiles
from extend.train.memory import LayerMemory, checkpoint_layers, make_memory, tile_layers
from extend.train.mesh import Processes, longest_local
from extend.train_options import TrainOptions

logger = logging.getLogger(__name__)


def save_memory(model: PreTrainedModel, options: TrainOptions, config: ModelConfig,
                processes: Processes) -> LayerMemory | None:
    """Let the layers compute and keep as the options say; None where they keep everything."""
    tile_layers(model, options, longest_local(options, processes.world))
    recomputed = count_recomputed(options, config, len(model.get_decoder().layers), processes)
    if compiles(options, processes.device):
        compile_layers(model, recomputed)
    if recomputed == 0:
        return None
    memory = make_memory(options, recomputed, processes.device, processes.local_world)
    checkpoint_layers(model, memory)
    return memory


def count_recomputed(options: TrainOptions, config: ModelConfig, num_layers: int,
                     processes: Processes) -> int:
    """Layers that are computed again; the same in all processes, of which each computes its part.

    Without a GPU, `auto` is all of them.
    """
    wanted = options.recomputed_layers
    if wanted == "auto" and processes.device.type == "cuda":
        memory = torch.cuda.get_device_properties(processes.device).total_memory
        wanted = processes.share(choose_recomputed_layers(
            config, options, world=processes.world, device_bytes=memory,
            hosts=processes.world // processes.local_world))
        if processes.is_main:
            logger.info("%d of %d layers are computed again for their backward", wanted, num_layers)
    return num_layers if wanted in ("auto", "all") else min(wanted, num_layers)
