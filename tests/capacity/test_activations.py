"""What a layer saves by formula, against the tensors that autograd asks to keep, to the byte."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager_decomp_partition
from torch._inductor import compile_fx
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from extend.capacity import Setup, model_shape
from extend.capacity.activations import layer_bytes
from extend.model_config import parse_config
from extend.ring.hf_attention import register_ring_attention
from extend.train.compiled import saving_backend
from extend.train.memory.tiles import is_tokenwise, tile_module

TOKENS, TILE = 64, 16
SIZES = {"hidden_size": 32, "intermediate_size": 112, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 16,
         "pad_token_id": 0}
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {},
            "biased": {"attention_bias": True, "mlp_bias": True}, "granite": {}, "smollm3": {}}


@lru_cache
def config_of(name: str):
    family = "llama" if name == "biased" else name
    return AutoConfig.for_model(family, **SIZES | FAMILIES[name])


def saved_bytes(name: str, *, compiled: bool = False, tiled: bool = False,
                trained: str = "all", again: bool = False) -> float:
    """Bytes a token of a layer's saved tensors, parameters and rotations left out."""
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16,
                                             attn_implementation=register_ring_attention())
    layer = model.train().model.layers[0]
    for parameter_name, parameter in layer.named_parameters():
        parameter.requires_grad_(trained == "all" or "norm" in parameter_name)
    for part in layer.modules():
        if tiled and is_tokenwise(part):
            tile_module(part, TILE)
    for part in layer.children():
        if compiled:
            saves = type(part).__name__.endswith("MLP") and not again
            part.forward = torch.compile(part.forward, backend=saving_backend if saves
                                         else aot_eager_decomp_partition)
    hidden = torch.randn(1, TOKENS, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(TOKENS)[None]
    rotations = model.model.rotary_emb(hidden, positions)
    shared = {t.untyped_storage()._cdata for t in (*layer.parameters(), *rotations)}
    kept = {}  # tensors are held, or their memory would be given to others

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, position_embeddings=rotations, position_ids=positions, attention_mask=None)
    sizes = [t.untyped_storage().nbytes() for key, t in kept.items() if key not in shared]
    return sum(sizes) / TOKENS


def expected_bytes(name: str, *, compiled: bool = False, tiled: bool = False,
                   trained: str = "all", again: bool = False) -> float:
    shape = model_shape(parse_config(config_of(name).to_dict(), Path("config.json")))
    setup = Setup(length=TOKENS, recomputed=0, compiled=compiled, trained=trained,
                  tile=TILE if tiled else None)
    return layer_bytes(shape, setup, again=again).saved


@pytest.mark.parametrize("how", [{}, {"tiled": True}, {"trained": "norms"}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_by_a_layer(name, how):
    assert saved_bytes(name, **how) == expected_bytes(name, **how)


@pytest.mark.parametrize("name,trained,again", [
    ("qwen3", "all", False), ("llama", "all", True), ("llama", "norms", False)])
def test_saved_by_a_compiled_layer(monkeypatch, name, trained, again):
    monkeypatch.setattr(compile_fx, "compile_fx", aot_eager_decomp_partition)  # no compiler needed
    torch._dynamo.reset()
    how = {"compiled": True, "trained": trained, "again": again}
    assert saved_bytes(name, **how) == expected_bytes(name, **how)
