"""What a layer keeps is taken by its own second run alone: where there is none, as below the first
trained parameter, nothing is kept; where it attends twice, each finds its own.
"""

from pathlib import Path

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from extend.model_config import read_config
from extend.ring.hf_attention import RingSettings
from extend.train.memory import LayerMemory, checkpoint_layers, make_memory
from extend.train.memory import store as store_module
from extend.train.model import CausalLoss, load_model
from extend.train_options import TrainOptions
from tests.train.tiny import options, save_model, save_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def save_diffllama(directory: Path) -> Path:
    """Each of its layers attends twice."""
    torch.manual_seed(0)
    DiffLlamaForCausalLM(DiffLlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def losses_and_gradients(module: CausalLoss, memory: LayerMemory | None) -> list[torch.Tensor]:
    """Of two rows, one after the other, as in a step of two batches."""
    found = []
    for seed in (0, 1):
        ids = torch.randint(0, 264, (1, 48), generator=torch.Generator().manual_seed(seed))
        module.zero_grad()
        loss, nll = module(ids, torch.arange(48)[None], ids.roll(-1, 1), torch.ones(1, 48) / 48,
                           RingSettings(keeper=memory))
        loss.backward()
        found += [nll, *(p.grad for p in module.parameters() if p.requires_grad)]
    return found


@pytest.mark.parametrize("changes", [
    {"trainable": [r"layers\.1\."]}, {"trainable": ["layers.1.mlp"], "mode": "lora"},
    {"trainable": [r"layers\.0\.mlp"]}, {"trainable": ["model.norm"]}, {"mode": "lora"}], ids=str)
def test_no_row_sees_what_another_kept(changes: dict, model_dir: Path,
                                       monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "_SMALLEST_BYTES", 1)
    run = options(model_dir, [{"kind": "retrieval"}], host_memory="1GiB", **changes)
    assert_same(run)


def test_a_layer_that_attends_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "_SMALLEST_BYTES", 1)
    model = save_diffllama(tmp_path)
    assert_same(options(model, [{"kind": "retrieval"}], host_memory="1GiB"))


def assert_same(run: TrainOptions) -> None:
    """Losses and gradients with memory are those without, to the bit."""
    config = read_config(run.model)
    plain = load_model(run, config)
    want = losses_and_gradients(CausalLoss(plain, 48), None)
    model = load_model(run, config)
    memory = make_memory(run, 2, CPU, 1)
    checkpoint_layers(model, memory)
    found = losses_and_gradients(CausalLoss(model, 48), memory)
    for some, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(some, wanted, rtol=0, atol=0)
    assert not memory.inputs._waiting  # nor is anything held for ever
    assert memory.inputs._free_bytes == 2**30
