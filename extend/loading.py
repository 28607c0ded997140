"""Load a checkpoint into a transformers model, with every tensor accounted for."""

import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from extend.checkpoint import Checkpoint
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.model_config import ModelConfig
from extend.output import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU.

    Raises:
        CompatibilityError: a CUDA device that is not there.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise RecipeError(f"device: {device!r} is not a device; write auto, cpu, cuda or "
                          "cuda:1") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise CompatibilityError(f"device {device!r} is not there; torch sees "
                                 f"{torch.cuda.device_count()} CUDA devices")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU, where attention is fast in it, and float32 on the CPU.

    Raises:
        RecipeError: no such dtype.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise RecipeError(f"dtype: unknown {dtype!r}; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_causal_lm(model: Path | str, config: ModelConfig, *, device: torch.device,
                   dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """Load the weights of a checkpoint under a config that may differ from its own.

    Args:
        attention: name of the implementation of attention.

    Raises:
        CheckpointError: damaged weights, or names that do not fit the architecture.
        CompatibilityError: an architecture that transformers does not know.
    """
    tensors = Checkpoint(model).infos  # a truncated shard is named before any loading
    if config.num_layers > len(tensors):
        raise CheckpointError(f"{model}: config.json announces {config.num_layers} layers, but the "
                              f"weights hold {len(tensors)} tensors; they are not of this config")
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(model), config=load_hf_config(config), dtype=dtype, local_files_only=True,
            trust_remote_code=False, use_safetensors=True,
            attn_implementation=attention, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CompatibilityError(f"{model}: transformers cannot load it ({error})") from error
    _check_loaded(model, config, info)
    return loaded.to(device).eval()


def read_hf_config(directory: Path | str) -> Any:
    """The transformers config of a checkpoint directory; code beside it is never run.

    Raises:
        CompatibilityError: transformers cannot read it, or would need such code.
    """
    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True,
                                          trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CompatibilityError(f"{directory}: transformers cannot read its config ({error})"
                                 ) from error


def load_hf_config(config: ModelConfig) -> Any:
    """The transformers config of a `ModelConfig`, whose keys may differ from the file's."""
    with tempfile.TemporaryDirectory() as directory:
        write_json(Path(directory) / "config.json", dict(config.raw))
        return AutoConfig.from_pretrained(directory, local_files_only=True,
                                          trust_remote_code=False)


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model's forward takes keys and values.

    transformers 5.24 says `cache` and drops the older name in 5.40; before it, and in code that
    comes with a checkpoint, `cache` would be taken for something else and silently not be used.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _check_loaded(model: Path | str, config: ModelConfig, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Old checkpoints store the RoPE frequencies, which the config decides.
        names = sorted(n for n in map(str, info.get(kind) or ())
                       if not n.endswith("rotary_emb.inv_freq"))
        if names:
            raise CheckpointError(f"{model}: {len(names)} {kind.replace('_', ' ')} for "
                                  f"{config.architecture}, the first {names[0]!r}; the weights are "
                                  "not those of this config")
