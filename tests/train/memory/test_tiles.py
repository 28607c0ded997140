"""Tiled modules against the same modules whole, in fp64."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from extend.train.memory.tiles import tile_module

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2)
MAKE = {"mlp": lambda: LlamaMLP(CONFIG), "norm": lambda: LlamaRMSNorm(16)}


def gradients(module, x, dout):
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(dout)
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize("tile", [1, 5, 12, 64])
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_tiled_module_computes_what_it_was(kind, tile, frozen):
    torch.manual_seed(0)
    module = MAKE[kind]().double()
    if frozen:
        next(module.parameters()).requires_grad_(False)
    x, dout = torch.randn(2, 24, 16).double(), torch.randn(2, 24, 16).double()
    expected = gradients(module, x, dout)
    names = list(module.state_dict())
    module.zero_grad()
    tile_module(module, tile)
    assert list(module.state_dict()) == names and isinstance(module, type(MAKE[kind]()))
    # fp64, sums in another order; norms work in fp32 (eps 1.2e-7) by their own code.
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if kind == "mlp" else {"rtol": 1e-5, "atol": 1e-6}
    for found, wanted in zip(gradients(module, x, dout), expected, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


def test_an_input_without_a_gradient_asks_for_none():
    module = MAKE["mlp"]()
    tile_module(module, 4)
    module(torch.randn(1, 12, 16)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_parameters_get_one_gradient_a_call():
    module, calls = MAKE["mlp"](), []
    tile_module(module, 4)
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p.shape))
    module(torch.randn(1, 12, 16, requires_grad=True)).sum().backward()
    assert len(calls) == 3


def test_autocast_reaches_the_tiles():
    torch.manual_seed(0)
    module, x = MAKE["mlp"](), torch.randn(1, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(module, x, torch.ones(1, 12, 16, dtype=torch.bfloat16))
    module.zero_grad()
    tile_module(module, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(module, x, torch.ones(1, 12, 16, dtype=torch.bfloat16))
    for some, wanted in zip(found, expected, strict=True):
        assert some.dtype == wanted.dtype
        # bf16 products, rounded tile by tile: two units of 2**-8 of the largest value.
        torch.testing.assert_close(some, wanted, rtol=0, atol=2**-7 * float(wanted.abs().max()))


def test_only_the_input_is_saved():
    module, saved = MAKE["mlp"](), []
    tile_module(module, 4)
    assert isinstance(module, nn.Module)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t,
                                                  lambda t: t):
        module(torch.randn(1, 12, 16, requires_grad=True))
    assert saved == [torch.Size([1, 12, 16])]


def test_autocast_of_the_forward_is_that_of_the_backward():
    """The backward pass runs outside; on a GPU the dtype that is set there is fp16, not bf16."""
    module, x = MAKE["mlp"](), torch.randn(1, 12, 16, requires_grad=True)
    tile_module(module, 4)
    seen = []
    module.up_proj.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.float16):
        out = module(x)
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    out.sum().backward()
    assert seen == [torch.float16] * 6  # three tiles, forward and backward
