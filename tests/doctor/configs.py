"""Configurations small enough to build models from, and directories that hold them."""

import json
from pathlib import Path
from typing import Any

HEAD_DIM = 16
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
         "max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "factor": 16.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LONG = [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0]
LONGROPE = {"rope_type": "longrope", "factor": 16.0, "short_factor": LONG, "long_factor": LONG,
            "attention_factor": 1.0, "original_max_position_embeddings": 256}


def llama(**changes: Any) -> dict[str, Any]:
    """A Llama's config.json with theta 500000 in no spelling unless given."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **changes}


def scaled(entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A Llama whose scaling is written for transformers 4 and 5 alike."""
    inner = {"rope_theta": 5e5, **entries}
    top = {"original_max_position_embeddings": entries["original_max_position_embeddings"]} if (
        "original_max_position_embeddings" in entries) else {}
    return llama(rope_theta=5e5, rope_scaling=inner, rope_parameters=dict(inner), **top, **changes)


def save(directory: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None = None,
         generation: dict[str, Any] | None = None) -> Path:
    """Write the files of a checkpoint without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in (("config.json", config), ("tokenizer_config.json", tokenizer),
                       ("generation_config.json", generation)):
        if data is not None:
            (directory / name).write_text(json.dumps(data))
    return directory


def load(directory: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((directory / name).read_text())
