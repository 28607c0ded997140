"""What torchao gives: its import, and linear layers that multiply in 8 bits."""

import importlib
import logging
import os

import torch
from torch import nn
from transformers import PreTrainedModel

from extend.console import hushing_imports
from extend.errors import CompatibilityError
from extend.train.mesh import split_phase
from extend.train_options import TrainOptions

logger = logging.getLogger(__name__)

_BLOCK = 16  # what a product in 8 bits wants its sizes to be multiples of
_RECIPES = {"float8": "tensorwise", "float8-rowwise": "rowwise"}


def require_torchao(what: str) -> None:
    """Import torchao without its words about kernels that this machine cannot load.

    Raises:
        CompatibilityError: it is not installed, or does not fit the installed torch.
    """
    # Its own kernels are for other uses: the optimizers and training in float8 need torch's alone.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    try:
        with hushing_imports():
            for name in ("torchao.optim", "torchao.float8"):
                importlib.import_module(name)
    except ImportError as error:
        raise CompatibilityError(f"{what} needs torchao, which cannot be imported ({error}); "
                                 "pip install 'extend-context[torchao]'") from None


def check_low_bits(options: TrainOptions, dtype: torch.dtype, world: int) -> None:
    """Check what needs no weights, so that nothing is read in vain.

    Args:
        dtype: that layers compute in.
        world: number of processes.

    Raises:
        CompatibilityError: moments or products in 8 bits cannot be had for this run or here.
    """
    if options.optimizer == "adamw-8bit":
        require_torchao("optimizer adamw-8bit")
    if options.linear_dtype != "compute":
        _check_float8(options, dtype, world)


def _check_float8(options: TrainOptions, dtype: torch.dtype, world: int) -> None:
    kind = options.linear_dtype
    require_torchao(f"linear_dtype {kind}")
    if dtype != torch.bfloat16:
        raise CompatibilityError(f"linear_dtype {kind} rounds what is bfloat16, but layers compute "
                                 f"in {str(dtype).removeprefix('torch.')}; set compute_dtype "
                                 "bfloat16")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        major, minor = torch.cuda.get_device_capability()
        raise CompatibilityError(f"linear_dtype {kind} needs a GPU of compute capability 8.9 or "
                                 f"more, {torch.cuda.get_device_name()} has {major}.{minor}; leave "
                                 "linear_dtype out")
    tile = options.tile_tokens
    if isinstance(tile, int) and tile % _BLOCK:
        raise CompatibilityError(f"linear_dtype {kind} needs a multiple of {_BLOCK} tokens at a "
                                 f"time, tile_tokens is {tile}; choose another")
    for number, phase in enumerate(options.schedule, start=1):
        local = phase.length // split_phase(phase, world, options.tensor_parallel)[1]
        if local % _BLOCK:
            raise CompatibilityError(
                f"phase {number}: linear_dtype {kind} needs a multiple of {_BLOCK} tokens in each "
                f"process, a row of {phase.length} gives {local}; choose another length")


def use_float8(model: PreTrainedModel, options: TrainOptions) -> None:
    """Let the decoder's linear layers multiply in 8 bits; weights keep their dtype and names.

    Layers whose sizes are no multiples of 16 stay as they are, and one line says which. Without a
    GPU the products are emulated: operands are rounded to 8 bits and multiplied in fp32.

    Raises:
        CompatibilityError: no layer could.

    Source: torchao's float8 training recipes; Llama 3.1 (arXiv:2407.21783, section 3.4) leaves
        attention and head in bf16 as well.
    """
    if options.linear_dtype == "compute":
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    linear = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()}
    left = [name for name, module in linear.items()
            if module.in_features % _BLOCK or module.out_features % _BLOCK]
    if len(left) == len(linear):
        raise CompatibilityError(f"linear_dtype {options.linear_dtype}: of {len(linear)} linear "
                                 f"layers none has sizes that are multiples of {_BLOCK}; leave "
                                 "linear_dtype out")
    if left:
        logger.warning("%d of %d linear layers stay in bfloat16, since their sizes are no "
                       "multiples of %d: %s", len(left), len(linear), _BLOCK,
                       ", ".join(f"{name} {tuple(linear[name].weight.shape)}" for name in left))
    config = Float8LinearConfig.from_recipe_name(_RECIPES[options.linear_dtype])
    object.__setattr__(config, "emulate", not torch.cuda.is_available())  # a frozen dataclass
    chosen = linear.keys() - set(left)
    convert_to_float8_training(model, config=config,
                               module_filter_fn=lambda _, name: name in chosen)
