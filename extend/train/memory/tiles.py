"""Modules that treat every token alone, run on a few tokens at a time.

An MLP's inner width is several times the model's, and a norm works in fp32: on a long row what they
hold between forward and backward, and while they compute, is far more than their input. A tiled
module saves its input alone and computes each tile again for its backward. The gradients of its
parameters are summed over the tiles and returned once, so whoever reduces them over processes sees
one gradient, whatever the number of tiles; and tiles need no agreement between processes, because
no tile communicates: what a tensor-parallel module sums over processes, it sums around its tiles.

Source: the tiled MLP of ALST, arXiv:2506.13996, section 3.2.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from extend.train.local import local_parameters


class _Tiled(torch.autograd.Function):
    """forward(x) of a module [..., n, d], in tiles of tokens."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, tile: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module, ctx.tile = module, tile
        ctx.save_for_backward(x)
        device = x.device.type
        # Both, because the backward pass runs where no autocast is and another dtype is set.
        ctx.autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        out = None
        for part, rows in _tiles(x, tile):
            y = module.plain_forward(part)
            out = y.new_empty((*x.shape[:-1], y.shape[-1])) if out is None else out
            out[..., rows, :] = y
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), local_parameters(ctx.module):
            return _gradients(ctx, dout)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """Those of the arguments of `_Tiled.forward`."""
    (x,), needs_x = ctx.saved_tensors, ctx.needs_input_grad[2]
    # Those of the module, not saved ones: whoever gathers sharded ones puts them there.
    parameters = list(ctx.module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    dx, sums = torch.empty_like(x) if needs_x else None, [None] * len(trained)
    with torch.autocast(x.device.type, *ctx.autocast):
        for part, rows in _tiles(x.detach(), ctx.tile):
            inputs = [part.requires_grad_()] if needs_x else []
            y = ctx.module.plain_forward(part)
            found = torch.autograd.grad(y, [*inputs, *trained], dout[..., rows, :].to(y.dtype))
            if needs_x:
                dx[..., rows, :] = found[0]
            sums = list(map(_add, sums, found[len(inputs):]))
    totals = iter(sums)
    return (None, None, dx, *(next(totals).to(p.dtype) if p.requires_grad else None
                              for p in parameters))


def _tiles(x: Tensor, tile: int) -> list[tuple[Tensor, slice]]:
    return [(x[..., i:i + tile, :], slice(i, i + tile)) for i in range(0, x.shape[-2], tile)]


def _add(total: Tensor | None, gradient: Tensor) -> Tensor:
    """Sums of several tiles are taken in fp32."""
    if total is None:
        return gradient
    if total.dtype in (torch.bfloat16, torch.float16):
        total = total.float()
    return total.add_(gradient)


def _tiled_forward(self: nn.Module, x: Tensor) -> Tensor:
    if x.shape[-2] <= self.tile_tokens:
        return self.plain_forward(x)
    return _Tiled.apply(self, self.tile_tokens, x, *self.parameters())


def tile_module(module: nn.Module, tile: int) -> None:
    """Let a module whose forward takes one tensor [..., n, d] run on `tile` tokens at a time.

    The module keeps its parameters and their names; only its class is another, as with torch's
    `fully_shard`. Call it before sharding.
    """
    module.__class__ = _tiled_class(type(module))
    module.tile_tokens = tile


@lru_cache
def _tiled_class(kind: type[nn.Module]) -> type[nn.Module]:
    """One class for all modules of a kind, so that they are compiled once."""
    return type(f"Tiled{kind.__name__}", (kind,), {
        "forward": _tiled_forward, "plain_forward": kind.forward})


def is_tokenwise(module: nn.Module) -> bool:
    """Whether a module treats every token alone and takes nothing else: an MLP, or a norm of the
    model's width. Norms of heads take [b, h, n, d] or [b, n, h, d] and are left whole.
    """
    return type(module).__name__.endswith(("MLP", "RMSNorm", "LayerNorm"))
