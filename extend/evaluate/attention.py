"""Causal attention for prefill: no mask, no length x length scores, and room for a KV cache.

transformers' own `sdpa` is as good while queries and keys are equally many. With a cache they are
not, and it builds a mask of queries x keys and repeats the KV heads. Here the new tokens attend
to the cache (all of it) and to themselves (causally) with the ring's kernels, and the two partial
results are joined through their log-sum-exp.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from extend.errors import CompatibilityError
from extend.ring.kernels import choose_kernel
from extend.ring.lse import merge_partial
from extend.ring.mask import CAUSAL, FULL, Mask

ATTENTION_NAME = "extend_prefill"

# Keywords with which a model asks its attention for something that is not computed here.
_REFUSED = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q")


def register_prefill_attention() -> str:
    """Make it known to transformers and return its name; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, prefill_attention)
    return ATTENTION_NAME


def prefill_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                      attention_mask: Tensor | None, *, scaling: float | None = None,
                      **kwargs: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it; the queries are the last of the keys' positions.

    Args:
        query: [b, h, s_new, d].
        key, value: [b, h_kv, s_cached + s_new, d].

    Returns:
        out [b, s_new, h, d], and None for the weights.

    Raises:
        CompatibilityError: the model asks for a mask or for what these kernels do not compute.
    """
    asked = [name for name in _REFUSED if kwargs.get(name) is not None]
    if attention_mask is not None or asked:
        raise CompatibilityError(
            f"{type(module).__name__} asks its attention for {', '.join(asked) or 'a mask'}, which "
            "evaluation does not compute; only models with plain causal attention are supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = choose_kernel("auto", query, key, mask=Mask(causal=True))
    new, cached = query.shape[2], key.shape[2] - query.shape[2]
    out, lse = kernel.forward(query, key.narrow(2, cached, new), value.narrow(2, cached, new),
                              mask=CAUSAL, softmax_scale=scale)
    if cached:
        past, past_lse = kernel.forward(query, key.narrow(2, 0, cached),
                                        value.narrow(2, 0, cached), mask=FULL,
                                        softmax_scale=scale)
        out, lse = out.to(torch.promote_types(out.dtype, torch.float32)), lse.clone()
        merge_partial(out, lse, past, past_lse)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None
