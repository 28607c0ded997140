"""Compiled parts compute what plain ones do, and layers share their compilations."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from transformers import LlamaConfig, LlamaForCausalLM

from extend.errors import CompatibilityError
from extend.ring.hf_attention import RingSettings, register_ring_attention
from extend.train import compiled, loss
from extend.train.memory import LayerMemory, checkpoint_layers, make_memory, tile_layers
from extend.train.model import CausalLoss
from extend.train_options import TrainOptions
from tests.train.tiny import options

CPU = torch.device("cpu")


def make_model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
        attn_implementation=register_ring_attention()))


def loss_and_gradients(model: LlamaForCausalLM, memory: LayerMemory | None) -> list[torch.Tensor]:
    ids = torch.arange(40)[None] % 64
    ring = RingSettings(keeper=memory)
    module = CausalLoss(model, 16, compiled=memory is not None)
    total, _ = module(ids, torch.arange(40)[None], ids, torch.ones(1, 40), ring)
    total.backward()
    return [total.detach(), *(p.grad for p in model.parameters())]


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch):
    """Traces and partitions as for a GPU, but needs no compiler."""
    torch._dynamo.reset()
    counters.clear()
    loss._compile.cache_clear()
    monkeypatch.setattr(compile_fx, "compile_fx", aot_eager)
    yield
    torch._dynamo.reset()
    loss._compile.cache_clear()


def compiled_model(layers: int, settings: TrainOptions) -> tuple[LlamaForCausalLM, LayerMemory]:
    model = make_model(layers).train()
    tile_layers(model, settings, 40)
    compiled.compile_layers(model, 1)
    memory = make_memory(settings, 1, CPU, 1)
    checkpoint_layers(model, memory)
    return model, memory


def test_compiled_layers_equal_plain_ones_and_share_their_compilations(eager_backend: None):
    settings = options("model", [{"kind": "retrieval"}], compile=True, tile_tokens=8,
                       recomputed_layers=1)
    found = loss_and_gradients(*compiled_model(2, settings))
    expected = loss_and_gradients(make_model(2).train(), None)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)  # fp32, sums in other order
    graphs = counters["stats"]["unique_graphs"]
    loss_and_gradients(*compiled_model(5, settings))
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(compiled, "_compile", lambda module, backend: asked.append(
        (type(module).__name__, backend)))
    compiled.compile_layers(make_model(3), recomputed=1)
    assert sorted(name for name, _ in asked) == [
        *["LlamaAttention"] * 3, *["LlamaMLP"] * 3, *["LlamaRMSNorm"] * 7]
    assert [backend for name, backend in asked if name == "LlamaMLP"] == [
        "inductor", compiled.saving_backend, compiled.saving_backend]
    assert {backend for name, backend in asked if name != "LlamaMLP"} == {"inductor"}


@pytest.mark.parametrize(("choice", "device", "triton", "expected"), [
    ("auto", "cpu", True, False), ("auto", "cuda", True, True), ("auto", "cuda", False, False),
    (False, "cuda", True, False), (True, "cpu", False, True), (True, "cuda", True, True)])
def test_whether_to_compile(choice: bool | str, device: str, triton: bool, expected: bool,
                            monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: "found" if triton else None)
    settings = options("model", [{"kind": "retrieval"}], compile=choice)
    assert compiled.compiles(settings, torch.device(device)) is expected


def test_compiling_on_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(CompatibilityError, match="triton is not installed"):
        compiled.compiles(options("model", [{"kind": "retrieval"}], compile=True),
                          torch.device("cuda"))
