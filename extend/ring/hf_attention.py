"""The ring as an attention implementation of transformers.

    register_ring_attention()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=ATTENTION_NAME)
    model(input_ids=local_ids, position_ids=local_positions, ring=RingSettings(group, "zigzag"))

transformers hands unknown keywords of `model(...)` down to the attention function, so the settings
travel with the call and there is nothing global to set or forget. Without `ring` the same kernels
run on one process. Whatever the ring cannot honour (padding, packed rows, windows, sinks, dropout,
a cache) is refused by name, because an ignored mask is a wrong model without an error.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from extend.errors import CompatibilityError
from extend.ring.attention import attend
from extend.ring.comm import RingComm

ATTENTION_NAME = "extend_ring"

# Keywords with which a model asks its attention for something that the ring does not compute.
_REFUSED = {
    "softcap": "capped scores",
    "s_aux": "attention sinks",
    "cu_seq_lens_q": "packed documents",
    "cu_seq_lens_k": "packed documents",
    "output_attentions": "returned attention weights",
}


@dataclass(frozen=True)
class RingSettings:
    """How one call of a model spreads its sequence.

    `group` holds the ranks that share a sequence (None: the default process group), `layout` is a
    name in LAYOUTS, `kernel` a name in KERNELS or "auto". Every rank passes its own part of the
    ids and the positions, as `shard` cuts them.
    """

    group: ProcessGroup | None = None
    layout: str = "zigzag"
    kernel: str = "auto"


def register_ring_attention() -> str:
    """Make the ring known to transformers and return its name; calling it again changes nothing."""
    # Imported here: the ring alone works without transformers, which takes seconds to load.
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, ring_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, refuse_padding)
    return ATTENTION_NAME


def ring_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    ring: RingSettings | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: q [b, h, s, d], k and v [b, h_kv, s, d] -> [b, s, h, d].

    Raises:
        CompatibilityError: the model asks for something that the ring does not compute.
    """
    settings = ring or RingSettings()
    comm = RingComm(settings.group) if ring else RingComm.alone()
    layer = getattr(module, "layer_idx", None)
    _refuse_arguments(attention_mask, dropout, kwargs)
    _refuse_cache(query, key)
    _refuse_window(module, layer, sliding_window, query.shape[2] * comm.world)
    if layer == 0 and position_ids is not None:
        _refuse_packing(position_ids)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attend(
        query, key, value, comm=comm, layout=settings.layout, causal=causal,
        softmax_scale=scaling, kernel=settings.kernel,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def refuse_padding(
    *, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> None:
    """What transformers calls to build a mask: there is none, the layout knows what is causal.

    Raises:
        CompatibilityError: a row is padded, or the model adds a mask of its own.
    """
    if use_vmap:
        raise _refusal("a mask of the model's own", "load this model with 'sdpa'")
    if attention_mask is not None and not bool(attention_mask.all()):
        padded = int(attention_mask.numel() - attention_mask.sum())
        raise _refusal(
            f"an attention mask with {padded} padded positions",
            "pass rows of full length and no attention_mask",
        )


def _refuse_arguments(
    attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    if attention_mask is not None:
        raise _refusal(
            f"an attention mask of shape {tuple(attention_mask.shape)}", "pass no attention_mask"
        )
    if dropout:
        raise _refusal(f"attention dropout {dropout}", "set attention_dropout to 0 in the config")
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise _refusal(f"{meaning} (keyword {name!r})", "load this model with 'sdpa'")


def _refuse_cache(query: Tensor, key: Tensor) -> None:
    if query.shape[2] != key.shape[2]:
        raise _refusal(
            f"{query.shape[2]} queries against {key.shape[2]} keys (a KV cache)",
            "load the model with attn_implementation='sdpa' to generate",
        )


def _refuse_window(
    module: nn.Module, layer: int | None, sliding_window: int | None, seq_len: int
) -> None:
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    kind = kinds[layer] if kinds and layer is not None else "full_attention"
    if sliding_window is not None and sliding_window < seq_len:
        raise _refusal(
            f"a sliding window of {sliding_window} over {seq_len} tokens in layer {layer}",
            "use a model with full attention, or sequences no longer than the window",
        )
    if kind not in ("full_attention", "sliding_attention"):
        raise _refusal(f"layer {layer} of type {kind!r}", "use a model with full attention")


def _refuse_packing(position_ids: Tensor) -> None:
    """Local positions increase in every layout; where they restart, another document begins."""
    if bool((position_ids.diff(dim=-1) <= 0).any()):
        raise _refusal(
            "position_ids that restart inside a row (packed documents)",
            "number the whole row from 0, or pass one document a row",
        )


def _refusal(what: str, remedy: str) -> CompatibilityError:
    return CompatibilityError(f"attention {ATTENTION_NAME!r} does not compute {what}; {remedy}")
