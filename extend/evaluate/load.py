"""Load a model and its tokenizer for evaluation."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from extend.checkpoint import Checkpoint
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.evaluate.adapted import adapted_config, add_adapter, load_hf_config
from extend.evaluate.attention import register_prefill_attention
from extend.model_config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHUNK = {"cuda": 131072, "cpu": 16384}


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


def choose_chunk(chunk: int | None, device: torch.device) -> int:
    """Tokens in one forward: what was asked for, or what fits the device's attention."""
    if chunk is not None:
        return chunk
    return _CHUNK.get(device.type, _CHUNK["cpu"])


def load_model(model: Path | str, *, adapter: Path | str | None = None, device: torch.device,
               dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint for prefill, with every tensor accounted for, and add an adapter to it.

    Raises:
        CheckpointError: damaged weights, or names that do not fit the architecture.
        CompatibilityError: an architecture that transformers does not know, or an adapter of
            another model.
    """
    config = adapted_config(model, adapter)
    Checkpoint(model)  # headers against sizes: a truncated shard is named before any loading
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(model), config=load_hf_config(config), dtype=dtype, local_files_only=True,
            attn_implementation=register_prefill_attention(), output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CompatibilityError(f"{model}: transformers cannot load it ({error})") from error
    _check_loaded(model, config, info)
    loaded = loaded.to(device).eval()
    if adapter is not None:
        add_adapter(loaded, adapter)
    return loaded


def _check_loaded(model: Path | str, config: ModelConfig, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Old checkpoints store the RoPE frequencies, which the config decides.
        names = sorted(n for n in map(str, info.get(kind) or ())
                       if not n.endswith("rotary_emb.inv_freq"))
        if names:
            raise CheckpointError(f"{model}: {len(names)} {kind.replace('_', ' ')} for "
                                  f"{config.architecture}, the first {names[0]!r}; the weights are "
                                  "not those of this config")
