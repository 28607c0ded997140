"""Tiny random models on disk: a base, its long fine-tune, and a sibling to merge into."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB, NATIVE, LONG = 96, 128, 1024
THETA, LONG_THETA = 10000.0, 250000.0
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Models:
    """Directories of a base, of the base made long, and of a fine-tune with the base's RoPE."""

    base: Path
    tuned: Path
    target: Path


def build(family: str, *, tied: bool = False, **changes) -> PreTrainedModel:
    """A model whose norms, biases and weights are all away from their initial values."""
    config_class, model_class = FAMILIES[family]
    config = config_class(**{**SIZES, "max_position_embeddings": NATIVE, "rope_parameters": {
        "rope_type": "default", "rope_theta": THETA}, "tie_word_embeddings": tied, **changes})
    torch.manual_seed(0)
    model = model_class(config)
    move(model, seed=1, scale=0.02)
    return model.eval()


@torch.no_grad()
def move(model: PreTrainedModel, *, seed: int, scale: float) -> None:
    """Add noise to every parameter; its low-rank part is stronger, as in a real fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            left = torch.randn(parameter.shape[0], 4, generator=generator)
            right = torch.randn(4, parameter.shape[1], generator=generator)
            noise = 0.3 * noise + left @ right
        parameter += scale * noise.to(parameter.dtype)


def set_context(model: PreTrainedModel, theta: float, length: int) -> None:
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    model.config.max_position_embeddings = length


def save(model: PreTrainedModel, directory: Path, dtype: torch.dtype, **options) -> Path:
    model.to(dtype).save_pretrained(directory, **options)
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text(
        json.dumps({"max_length": NATIVE, "do_sample": False, "eos_token_id": 2}))
    return directory


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": NATIVE,
         "unk_token": "0"}))
    (directory / "chat_template.jinja").write_text(f"{directory.name}: {{{{ messages }}}}")


def make_models(root: Path, family: str, dtype: torch.dtype, *, tied: bool = False,
                **changes) -> Models:
    """Write base, tuned and target; all three are stored in `dtype`."""
    base = save(build(family, tied=tied, **changes), root / "base", dtype)
    tuned_model = build(family, tied=tied, **changes)
    move(tuned_model, seed=2, scale=0.01)
    set_context(tuned_model, LONG_THETA, LONG)
    tuned = save(tuned_model, root / "tuned", dtype)
    target_model = build(family, tied=tied, **changes)
    move(target_model, seed=3, scale=0.01)
    return Models(base=base, tuned=tuned, target=save(target_model, root / "target", dtype))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
