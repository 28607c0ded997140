"""Attention over a sequence that is spread over several processes."""

from extend.ring.attention import ring_attention
from extend.ring.comm import RingComm
from extend.ring.hf_attention import ATTENTION_NAME, RingSettings, register_ring_attention
from extend.ring.kernels import KERNELS
from extend.ring.layouts import LAYOUTS, check_length, length_multiple, shard, unshard

__all__ = [
    "ATTENTION_NAME",
    "KERNELS",
    "LAYOUTS",
    "RingComm",
    "RingSettings",
    "check_length",
    "length_multiple",
    "register_ring_attention",
    "ring_attention",
    "shard",
    "unshard",
]
