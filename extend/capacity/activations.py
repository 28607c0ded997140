"""Bytes a token that one decoder layer keeps and needs, exact for what transformers computes.

Widths: D hidden, Q and K channels of all query and of all key heads, I inner of the MLP; with
tensor parallelism a process holds its share of Q, K and I and the whole of D. Values are bf16 (2
bytes) but for the fp32 copies in which plain norms work, `lse`, and one scale a norm.

What autograd saves between a layer's forward and backward:

                      plain                        compiled                tiled
    norm of D         4 D + 2 D + 4                2 D + 4 (its input)     2 D (its input)
    norm's output     2 D                          2 D                     2 D
    q, k, v           2 (Q + 2 K)                  the same                the same
    norm of heads     4 (Q+K) + 2 (Q+K) + 4 h      2 (Q+K) + 4 h           as without tiles
    out and lse       2 Q + 4 heads                the same                the same
    exchanged heads   2 Q more: out of some heads for all rows, and of all heads for some rows
    gated MLP         2 * 4 I: gate, silu, up,     2 * 2 I: gate, up       nothing: its input is
                      product                      (product too)           the norm's output
    adapters, rank r  2 r a linear layer           the same                those of attention

In brackets, of a layer that was computed again: there compiled code also saves the product.

The output of a norm is saved once for all projections that read it. What a frozen matrix does not
need is left out: its input; a frozen norm leaves out its 2 D.

Source: read off torch's autograd with saved-tensor hooks, see tests/capacity/test_activations.py,
where the table is held against real layers, plain and compiled.
"""

import math
from dataclasses import dataclass

from extend.capacity.setup import Setup
from extend.capacity.shape import ModelShape

VALUE = 2  # bytes of a value that layers compute with


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes a token of one layer.

    Attributes:
        input: its input, kept where it is computed again.
        attention: what attention gave, out and lse.
        saved: all that autograd saves, `attention` among it.
        holds_input: whether `input` is part of `saved`.
        mlp_extra: what the MLP's backward needs on top of `saved` when it is largest.
        rotation: what is there while queries are rotated, when a layer is computed again.
        attention_backward: what is there in attention's backward, without the ring's buffers.
    """

    input: float
    attention: float
    saved: float
    holds_input: bool
    mlp_extra: float
    rotation: float
    attention_backward: float

    @property
    def recomputed(self) -> float:
        """All of a layer that was just computed again: `saved`, and its input beside it."""
        return self.saved + (0.0 if self.holds_input else self.input)


def layer_bytes(shape: ModelShape, setup: Setup, *, again: bool = False) -> LayerBytes:
    """Of the mean layer of a model, of those that are computed again or of those that are not."""
    hidden, tp = shape.hidden, setup.tp
    q, k, heads = shape.q_width / tp, shape.kv_width / tp, shape.num_heads / tp
    attention = VALUE * q + 4 * heads
    exchanged = exchanges_heads(setup)
    times = math.lcm(shape.num_kv_heads, setup.cp) / shape.num_kv_heads if exchanged else 1
    qkv = VALUE * (q + 2 * k * times) + VALUE * q * exchanged
    matrices = setup.trained != "norms"
    norms = shape.num_norms * _norm(setup, hidden)
    # Its input is the residual stream's value, which a plain norm does not save as it is.
    holds_input = setup.compiled or setup.used_tile is not None
    outputs = _norm_outputs(shape, setup, matrices)
    inner = VALUE * shape.active_inner / tp
    mlp = 0.0 if setup.used_tile else inner * _mlp_values(shape, setup, matrices, again)
    low = VALUE * setup.lora_rank * has_adapters(setup)  # what goes from A to B
    saved = norms + outputs + qkv + _head_norms(shape, setup, q, k) + attention + mlp + 4 * low
    if not setup.used_tile:
        saved += shape.num_matrices * low
    normed = VALUE * hidden
    rotating = VALUE * ((2 * q + 2 * k) if setup.compiled else (4 * q + 2 * k))
    # Input, norm and its output, q, k, v, out; gradients of the residual and of out; dq, dk, dv.
    before = saved - mlp - (norms + outputs) * (1 - 1 / shape.num_norms) - VALUE * q * exchanged
    gradients = VALUE * hidden + VALUE * (2 * q + 2 * k)
    own_input = VALUE * hidden
    return LayerBytes(
        input=VALUE * hidden, attention=attention, saved=saved, holds_input=holds_input,
        mlp_extra=VALUE * hidden + _mlp_extra(shape, setup, inner, matrices, again),
        rotation=own_input + normed * 2 + rotating,
        attention_backward=before + gradients + (0 if holds_input else own_input))


def has_adapters(setup: Setup) -> bool:
    return setup.trained in ("lora", "lora+")


def exchanges_heads(setup: Setup) -> bool:
    """Whether attention exchanges rows for heads (Ulysses); `auto` prefers what takes less memory.
    """
    return setup.cp > 1 and setup.strategy.partition(":")[0] in ("ulysses", "usp")


def num_groups(shape: ModelShape, setup: Setup) -> int:
    """Groups of heads that an exchange takes one after another, two at least and four at most."""
    heads = math.lcm(shape.num_kv_heads // setup.tp or 1, setup.cp) // setup.cp
    return next(n for n in (4, 3, 2, 1) if heads % n == 0)


def _norm(setup: Setup, hidden: int) -> float:
    if setup.used_tile:
        return VALUE * hidden
    if setup.compiled:
        return VALUE * hidden + 4
    trains = setup.trained in ("all", "lora+", "norms")
    return (4 + VALUE * trains) * hidden + 4


def _norm_outputs(shape: ModelShape, setup: Setup, matrices: bool) -> float:
    """Outputs that projections save; a tiled MLP saves its input whatever it trains."""
    attention, mlp = matrices, matrices or setup.used_tile is not None
    return VALUE * shape.hidden * ((attention + mlp) if shape.num_norms > 1 else mlp)


def _head_norms(shape: ModelShape, setup: Setup, q: float, k: float) -> float:
    if shape.head_norm is None:
        return 0.0
    scales = shape.num_heads + shape.num_kv_heads if shape.head_norm == "head" else 2
    if setup.compiled:
        return VALUE * (q + k) + 4 * scales / setup.tp
    trains = setup.trained in ("all", "lora+", "norms")
    return (4 + VALUE * trains) * (q + k) + 4 * scales / setup.tp


def makes_product(shape: ModelShape, setup: Setup, again: bool) -> bool:
    """Whether the backward of an MLP makes what its last matrix reads from what else is saved; see
    `extend.train.compiled`. Experts are not compiled, and a tile saves nothing.
    """
    return (setup.compiled and not again and not setup.used_tile and not shape.num_experts
            and setup.trained != "norms")


def _mlp_values(shape: ModelShape, setup: Setup, matrices: bool, again: bool) -> float:
    """Inner values that are saved for each of the MLP's inner channels."""
    product = matrices and not makes_product(shape, setup, again)
    if shape.num_matrices == 2:
        return 1 + product
    return (2 if setup.compiled else 3) + product


# Inner values that are there at once in the middle of an MLP's backward, by its matrices: of a
# gated one gate, silu, up, and the gradients of product, silu and up; where it is compiled, one
# gradient is written over what is not needed any more, or, where the product is made again, that
# and all gradients are made together. The last was read off two H200s (128K, 22 of 32 layers
# computed again), for a gated MLP.
_INNER_PLAIN, _INNER_COMPILED, _INNER_MADE = {3: 6, 2: 3}, {3: 4, 2: 2}, {3: 6, 2: 4}
# With adapters, compiled code does not write gradients over what is not needed any more (one H200,
# 64K: 4 values more than without, exactly; 3 more where the product is made again).
_ADAPTED, _ADAPTED_MADE = {3: 4, 2: 2}, {3: 3, 2: 2}


def _inner_backward(shape: ModelShape, setup: Setup, again: bool) -> int:
    made, matrices = makes_product(shape, setup, again), shape.num_matrices
    if not setup.compiled:
        return _INNER_PLAIN[matrices]
    values = (_INNER_MADE if made else _INNER_COMPILED)[matrices]
    return values + has_adapters(setup) * (_ADAPTED_MADE if made else _ADAPTED)[matrices]


def _mlp_extra(shape: ModelShape, setup: Setup, inner: float, matrices: bool,
               again: bool) -> float:
    """Of an MLP's backward, beside the gradient of its output and what was saved for it; beside
    tiles, a whole gradient of their input.
    """
    if setup.used_tile:
        return VALUE * shape.hidden
    return inner * (_inner_backward(shape, setup, again)
                    - _mlp_values(shape, setup, matrices, again))


def tile_bytes(shape: ModelShape, setup: Setup) -> float:
    """Bytes, not a token but at once, of a tile of an MLP and of its weights' fp32 sums."""
    if not setup.used_tile:
        return 0.0
    inner = VALUE * shape.active_inner / setup.tp
    values = _inner_backward(shape, setup, again=False)
    of_tile = setup.used_tile * (values * inner + 2 * VALUE * shape.hidden)
    if setup.trained != "all":
        return of_tile
    matrices = shape.mlp_matrix / setup.tp
    return of_tile + (4 + VALUE) * matrices + VALUE * matrices / shape.num_matrices
