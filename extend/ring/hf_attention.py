"""The ring as an attention implementation of transformers.

    register_ring_attention()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=ATTENTION_NAME)
    model(input_ids=local_ids, position_ids=local_positions, ring=RingSettings(group, "zigzag"))

transformers hands unknown keywords of `model(...)` down to the attention function, so the settings
travel with the call and there is nothing global to set or forget. Without `ring` the same kernels
run on one process. A layer's sliding window arrives from transformers and means what it means
there: a query sees its own key and the `window - 1` before it. Packed documents are told by
`RingSettings.cu_seqlens`. Whatever the ring cannot honour (padding, sinks, capped scores, chunked
attention, dropout, a cache) is refused by name, because an ignored mask is a wrong model without an
error.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed import ProcessGroup

from extend.errors import CompatibilityError
from extend.ring.attention import attend
from extend.ring.comm import RingComm
from extend.ring.keep import Keeper, Kept
from extend.ring.layouts import LAYOUTS
from extend.ring.mask import Mask, make_mask

ATTENTION_NAME = "extend_ring"

# Keywords with which a model asks its attention for something that the ring does not compute.
_REFUSED = {
    "softcap": "capped scores",
    "s_aux": "attention sinks",
    "cu_seq_lens_q": "packed documents told by transformers' keywords, only by RingSettings",
    "cu_seq_lens_k": "packed documents told by transformers' keywords, only by RingSettings",
    "output_attentions": "returned attention weights",
}


@dataclass(frozen=True)
class RingSettings:
    """How one call of a model spreads its sequence.

    `group` holds the ranks that share a sequence (None: the default process group), `layout` is a
    name in LAYOUTS, `kernel` a name in KERNELS and `strategy` one in STRATEGIES, or "auto". Every
    rank passes its own part of the ids and the positions, as `shard` cuts them.

    `cu_seqlens`, (0, ..., length), says where documents begin in the *whole* row, which is then the
    only one of the call: tokens see their own document only. Positions may restart with each
    document or run on over all of them, which to rotary embeddings is the same. None: one document
    a row.

    `keeper` holds the attention of layers that run twice, see `extend.ring.keep`.
    """

    group: ProcessGroup | None = None
    layout: str = "zigzag"
    kernel: str = "auto"
    strategy: str = "auto"
    cu_seqlens: tuple[int, ...] | None = None
    keeper: Keeper | None = None


def register_ring_attention() -> str:
    """Make the ring known to transformers and return its name; calling it again changes nothing."""
    # Imported here: the ring alone works without transformers, which takes seconds to load.
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, ring_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, refuse_padding)
    return ATTENTION_NAME


@_disable_dynamo
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
    _refuse_arguments(attention_mask, dropout, kwargs)
    _refuse_cache(query, key)
    _refuse_layer(module, sliding_window)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = _mask_of_call(settings, causal, sliding_window, query, comm.world)
    if getattr(module, "layer_idx", None) == 0 and position_ids is not None:
        _refuse_restarts(position_ids, mask, settings.layout, comm)
    out = attend(
        query, key, value, comm=comm, layout=settings.layout, mask=mask,
        softmax_scale=scaling, kernel=settings.kernel, strategy=settings.strategy,
        kept=_room(settings, module),
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _room(settings: RingSettings, module: nn.Module) -> Kept | None:
    """Where the layer's attention is kept for its second run; without gradients there is none."""
    if settings.keeper is None or not torch.is_grad_enabled():
        return None
    return settings.keeper.of(getattr(module, "layer_idx", None))


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


class Layer(NamedTuple):
    """What a model's config says of the attention of one layer.

    Attributes:
        index: the layer's number, if the module knows it.
        is_known: whether it is full or sliding-window attention.
        kind: its entry in the config's layer_types, if there are any.
        is_sliding: whether it has a window.
        window: the config's window, in tokens; None where it names none.
    """

    index: int | None
    is_known: bool
    kind: str | None
    is_sliding: bool
    window: int | None


def read_layer(module: nn.Module) -> Layer:
    """Of the attention `module` of a model of transformers."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds and index is not None else None
    window = getattr(config, "sliding_window", None)
    # Without types one window holds for all layers (Mistral); with them, for the sliding ones.
    for_all = kind is None and bool(window) and getattr(config, "use_sliding_window", True)
    known = kind in (None, "full_attention", "sliding_attention")
    return Layer(index, known, kind, bool(for_all) or kind == "sliding_attention", window)


def _refuse_layer(module: nn.Module, window: int | None) -> None:
    """Refuse a layer whose attention is of another kind, or that keeps its window to itself."""
    layer = read_layer(module)
    if not layer.is_known:
        raise _refusal(
            f"layer {layer.index} of type {layer.kind!r}",
            "use a model with full or sliding-window attention",
        )
    if window is None and layer.is_sliding:
        raise _refusal(
            f"the sliding window of {layer.window} in layer {layer.index}, because "
            f"{type(module).__name__} does not pass it on",
            "load this model with 'sdpa', or set its sliding_window to null",
        )


def _mask_of_call(
    settings: RingSettings, causal: bool, window: int | None, query: Tensor, world: int
) -> Mask:
    rows, seq_len = query.shape[0], query.shape[2] * world
    if settings.cu_seqlens is not None and rows != 1:
        raise _refusal(
            f"{rows} rows of packed documents (RingSettings.cu_seqlens) in one call",
            "pass one row with all documents side by side",
        )
    return _cached_mask(causal, window, settings.cu_seqlens, seq_len)


@lru_cache(maxsize=32)
def _cached_mask(
    causal: bool, window: int | None, cu_seqlens: tuple[int, ...] | None, seq_len: int
) -> Mask:
    """One object for all layers that have the same mask, so that none is built or planned twice."""
    return make_mask(causal, window, cu_seqlens, seq_len)


def _refuse_restarts(position_ids: Tensor, mask: Mask, layout: str, comm: RingComm) -> None:
    """Local positions increase in every layout; where they do not, another document begins."""
    falls = position_ids.diff(dim=-1) <= 0
    if not bool(falls.any()):
        return
    seq_len = position_ids.shape[-1] * comm.world
    held = LAYOUTS[layout].positions(seq_len, comm.rank, comm.world)
    starts = torch.tensor((mask.cu_seqlens or ())[1:-1], dtype=torch.int64)
    same = torch.bucketize(held, starts, right=True).diff() == 0
    if bool((falls.cpu() & same).any()):
        raise _refusal(
            "position_ids that restart inside a row (packed documents) where "
            "RingSettings.cu_seqlens has no boundary",
            "give cu_seqlens the boundary, number the whole row from 0, or pass one document a row",
        )


def _refusal(what: str, remedy: str) -> CompatibilityError:
    return CompatibilityError(f"attention {ATTENTION_NAME!r} does not compute {what}; {remedy}")
