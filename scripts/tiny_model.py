"""Random models, a tokenizer of bytes, and text: what a run needs, small enough for a CPU."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
_WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 264,
          "initializer_range": 0.2}


def save_tiny_model(directory: Path, model_type: str, *, native_len: int, rope_theta: float,
                    seed: int = 0, drift_from: Path | None = None, **config: Any) -> Path:
    """Write a random model of an architecture, with one token a byte.

    Args:
        drift_from: a model to be a fine-tune of: its weights, each moved by 2 % of its spread.
        config: more keys of its config.json.
    """
    torch.manual_seed(seed)
    if drift_from is None:
        made = AutoConfig.for_model(
            model_type, max_position_embeddings=native_len,
            eos_token_id=0, bos_token_id=None, pad_token_id=None, **(_WIDTH | {
                "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}} | config))
        model = AutoModelForCausalLM.from_config(made)
    else:
        model = AutoModelForCausalLM.from_pretrained(drift_from)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.02 * parameter.std(correction=0)
            parameter.data += noise
    model.save_pretrained(directory)
    save_byte_tokenizer(directory, native_len)
    return directory


def save_byte_tokenizer(directory: Path, max_length: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {END: 0} | {char: i for i, char in enumerate(alphabet, start=1)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END,
                            model_max_length=max_length).save_pretrained(directory)


def save_text(file: Path, *, documents: int, lines: int) -> Path:
    """JSON lines with `text`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": "".join(
        f"Line {line} of text {n} says {line * n}.\n" for line in range(lines))}) + "\n"
        for n in range(documents)), encoding="utf-8")
    return file
