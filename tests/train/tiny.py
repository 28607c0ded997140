"""A tiny Llama, its byte-level tokenizer and some text, for the training tests."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedTokenizerFast

from extend.train_options import TrainOptions

NATIVE_LEN = 64
EOS = "<|end|>"


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {EOS: 0} | {char: i for i, char in enumerate(alphabet, start=1)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_model(directory: Path, *, tied: bool = True, seed: int = 0,
               window: int | None = None, **shape: int) -> Path:
    """A Llama of two layers with grouped KV heads, native length 64, fp32.

    With a sliding `window`, it is a Mistral. `shape` has other keys of the config.
    """
    torch.manual_seed(seed)
    make = LlamaForCausalLM if window is None else MistralForCausalLM
    shape = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48} | shape
    config = make.config_class(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=NATIVE_LEN, tie_word_embeddings=tied, initializer_range=0.2,
        **({} if window is None else {"sliding_window": window}), **shape)
    make(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_text(directory: Path, count: int = 40) -> Path:
    """Documents of one to six lines, as JSON lines."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": "".join(f"Line {i} of text {n} says {i * n}.\n"
                                         for i in range(n % 6 + 1))}) for n in range(count)]
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n")
    return directory / "text.jsonl"


def save_examples(directory: Path, count: int = 120) -> Path:
    """Prompts that ask for their number plus one."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": f"After {n} comes", "answer": f" {n + 1}."})
             for n in range(count)]
    (directory / "examples.jsonl").write_text("\n".join(lines) + "\n")
    return directory / "examples.jsonl"


def options(model: Path, data: list[dict], /, **changes: object) -> TrainOptions:
    """Options of a short fp32 run; `changes` override."""
    settings = {"model": str(model), "data": data, "loss_chunk": 48, "nproc": 1,
                "schedule": [{"length": 128, "steps": 4, "batch_rows": 2, "lr": 3e-3,
                              "rope": {"method": "ntk"}}]}
    return TrainOptions(**(settings | changes))
