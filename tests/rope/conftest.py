"""Small checkpoints to rescale."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

NATIVE = 256
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": NATIVE}


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": NATIVE,
         "unk_token": "0"}))
    (directory / "special_tokens_map.json").write_text('{"unk_token": "0"}')
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """Two layers, head_dim 16, plain RoPE, native length 256; never written to."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("source") / "llama"
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0}))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"max_length": 256, "do_sample": false}')
    (directory / "README.md").write_text("not part of the model")
    (directory / "manifest.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"not safetensors")
    (directory / "original").mkdir()
    return directory


@pytest.fixture
def damaged(llama, tmp_path) -> Path:
    """A copy of `llama` that a test may change, alone in its parent directory."""
    directory = tmp_path / "inputs" / "llama"
    directory.mkdir(parents=True)
    for file in llama.iterdir():
        if file.is_file():
            (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture
def sharded(damaged) -> Path:
    """The same tensors in two shards and an index."""
    tensors = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, damaged / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (damaged / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return damaged


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
