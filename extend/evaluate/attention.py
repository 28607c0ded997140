"""Causal attention for prefill: no mask, no length x length scores, and room for a KV cache.

transformers' own `sdpa` is as good while queries and keys are equally many and each query sees all
before it. With a cache or a sliding window it builds a mask of queries x keys and repeats the KV
heads. Here the ring's planner and kernels compute the same: the new tokens are the last positions
of the keys, and what they see is cut into tiles. One new token of each row sees all keys that are
its own, so it needs no planner.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from extend.errors import CompatibilityError
from extend.evaluate.fork import attend_after, put_before, shared_keys
from extend.ring.call import Call
from extend.ring.comm import RingComm
from extend.ring.hf_attention import read_layer
from extend.ring.kernels import choose_kernel
from extend.ring.mask import make_mask
from extend.ring.partial import AttentionSum
from extend.ring.tiles import Run, fit_tiles, plan_tiles

ATTENTION_NAME = "extend_prefill"

# Keywords with which a model asks its attention for something that is not computed here.
_REFUSED = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q")

# Not cuDNN's, which compiles a graph for every number of keys, and so in every step.
_STEP_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_DECODING: ContextVar["_Decoding | None"] = ContextVar("decoding", default=None)


class _Decoding:
    """What rows of one new token each see of caches that are aligned at their ends."""

    def __init__(self, seen: Tensor):
        self._seen = seen
        self._visible: dict[tuple[int, int | None], Tensor] = {}

    def visible(self, total: int, window: int | None) -> Tensor:
        """Which of `total` keys a row's token sees, bool [b, 1, 1, total]; made once a step."""
        if (total, window) not in self._visible:
            own = self._seen if window is None else self._seen.clamp(max=window)
            places = torch.arange(total, device=own.device)
            self._visible[total, window] = (places >= total - own[:, None])[:, None, None]
        return self._visible[total, window]


@contextlib.contextmanager
def decoding(seen: Tensor) -> Iterator[None]:
    """Within it models read one new token of each row, on caches that are aligned at their ends.

    Args:
        seen: tokens of each row so far, the new one included [b].
    """
    token = _DECODING.set(_Decoding(seen))
    try:
        with sdpa_kernel(_STEP_KERNELS):
            yield
    finally:
        _DECODING.reset(token)


def register_prefill_attention() -> str:
    """Make it known to transformers and return its name; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, prefill_attention)
    return ATTENTION_NAME


def prefill_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                      attention_mask: Tensor | None, *, scaling: float | None = None,
                      sliding_window: int | None = None,
                      **kwargs: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it; the queries are the last of the keys' positions.

    The keys may be fewer than the tokens so far: the cache of a layer with a window drops those
    that no later token sees.

    Args:
        query: [b, h, s_new, d].
        key, value: [b, h_kv, s_cached + s_new, d].
        sliding_window: tokens that a query sees, its own included; None is all up to its own.

    Returns:
        out [b, s_new, h, d], and None for the weights.

    Raises:
        CompatibilityError: the model asks for a mask or for what these kernels do not compute.
    """
    refuse_arguments(module, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    before = shared_keys(getattr(module, "layer_idx", None))
    if before is not None:
        reach = before[0].shape[2] + key.shape[2]
        refuse_layer(module, sliding_window, reach)
        if sliding_window is None or sliding_window >= reach:
            out = attend_after(query, key, value, before, scale)
            return out.transpose(1, 2).contiguous(), None
        key, value = put_before(before, key, value, sliding_window)
    refuse_layer(module, sliding_window, key.shape[2])
    if (rows := _DECODING.get()) is not None and query.shape[2] == 1:
        visible = rows.visible(key.shape[2], sliding_window)
        return _decode(query, key, value, visible, scale), None
    return _prefill(query, key, value, sliding_window, scale), None


def _prefill(query: Tensor, key: Tensor, value: Tensor, window: int | None,
             scale: float) -> Tensor:
    """Attention of the last tokens to all before them: [b, s_new, h, d]."""
    new, total = query.shape[2], key.shape[2]
    mask = make_mask(True, window, None, total)
    kernel = choose_kernel("auto", query, key, mask=mask)
    tiles = fit_tiles(plan_tiles((Run(total - new, 1, new),), (Run(0, 1, total),), mask),
                      bands=kernel.bands, packed=kernel.packed)
    attended = AttentionSum(query, Call(
        comm=RingComm.alone(), layout="contiguous", mask=mask, kernel=kernel, seq_len=total,
        softmax_scale=scale), [tiles])
    attended.add(tiles, key, value)
    out, _ = attended.result()
    return out.transpose(1, 2).contiguous()


def _decode(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of one token of each row to its `visible` keys: [b, 1, h, d].

    The heads that share keys are given as so many queries of one head: torch's kernels that take
    a mask take no groups, and would be fed a copy of the keys for each head.
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    out = functional.scaled_dot_product_attention(grouped, key, value, visible, scale=scale)
    return out.reshape(query.shape).transpose(1, 2)


def refuse_arguments(module: nn.Module, attention_mask: Tensor | None,
                      kwargs: dict[str, Any]) -> None:
    asked = [name for name in _REFUSED if kwargs.get(name) is not None]
    if attention_mask is not None or asked:
        raise CompatibilityError(
            f"{type(module).__name__} asks its attention for {', '.join(asked) or 'a mask'}, which "
            "evaluation does not compute; only models with plain causal attention, in a sliding "
            "window or not, are supported")


def refuse_layer(module: nn.Module, window: int | None, total: int) -> None:
    """Refuse a layer whose attention is of another kind, or that keeps its window to itself."""
    layer = read_layer(module)
    if not layer.is_known:
        raise CompatibilityError(
            f"layer {layer.index} is of type {layer.kind!r}, which evaluation does not compute; "
            "only models with full or sliding-window attention are supported")
    if window is None and layer.is_sliding and layer.window and total > layer.window:
        raise CompatibilityError(
            f"layer {layer.index} has a sliding window of {layer.window} tokens, which "
            f"{type(module).__name__} does not pass on to its attention, and {total} keys; "
            f"evaluate at most {layer.window} tokens of this model, or set its sliding_window to "
            "null (extend rescale with sliding_window 'drop')")
