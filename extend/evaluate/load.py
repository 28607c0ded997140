"""Load a model and its tokenizer for evaluation."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from extend.evaluate.adapted import adapted_config, add_adapter
from extend.evaluate.attention import register_prefill_attention
from extend.loading import load_causal_lm

_CHUNK = {"cuda": 131072, "cpu": 16384}


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
    loaded = load_causal_lm(model, config, device=device, dtype=dtype,
                            attention=register_prefill_attention())
    if adapter is not None:
        add_adapter(loaded, adapter)
    return loaded
