"""What is computed: shapes, masks, their work and their tensors."""

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """Attention over `seq_len` tokens, b = 1; hashable, the same on every rank.

    Attributes:
        window: tokens that a query sees; None: all.
        cu_seqlens: where documents begin; None: one document.
        causal: a query sees no later keys.
    """

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None = None
    cu_seqlens: tuple[int, ...] | None = None
    causal: bool = True

    @property
    def mask(self) -> str:
        """The mask's name in tables."""
        if self.cu_seqlens:
            return f"packed {len(self.cu_seqlens) - 1}"
        if not self.causal:
            return "not causal"
        return f"window {self.window}" if self.window else "dense"

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the mask lets through, of one head."""
        if not self.causal:
            return self.seq_len**2
        bounds = self.cu_seqlens or (0, self.seq_len)
        return sum(visible(b - a, self.window) for a, b in itertools.pairwise(bounds))

    def flops(self, kind: str) -> float:
        """Of one call, "fwd" or "fwd+bwd": 4 d a pair and head forward, 10 d backward."""
        return (4 if kind == "fwd" else 14) * self.head_dim * self.heads * self.pairs

    def cu_tensor(self, device: torch.device) -> Tensor | None:
        """cu_seqlens as the interface takes it."""
        if self.cu_seqlens is None:
            return None
        return torch.tensor(self.cu_seqlens, dtype=torch.int32, device=device)

    def tensors(self, rows: int, device: torch.device, heads_fraction: int = 1) -> list[Tensor]:
        """q, k, v, dout of `rows` tokens [1, h, s, d], in memory [1, s, h, d] as models have them.

        The same on every rank, rounded to the dtype. `heads_fraction` n: an nth of the heads.
        """
        generator = torch.Generator(device).manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [
            torch.randn(1, rows, h // heads_fraction, self.head_dim, generator=generator,
                        device=device).to(DTYPES[self.dtype]).transpose(1, 2)
            for h in heads
        ]  # fmt: skip


def visible(length: int, window: int | None) -> int:
    """Pairs in one document of `length` tokens."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def cut_documents(seq_len: int, count: int, multiple: int) -> tuple[int, ...]:
    """Boundaries of `count` documents of mixed lengths, all multiples of `multiple`; always alike.

    Raises:
        ValueError: there is no room for so many.
    """
    places = range(1, seq_len // multiple)
    if count - 1 > len(places) or seq_len % multiple:
        raise ValueError(f"{seq_len} tokens cannot be cut into {count} documents of {multiple} x n")
    cuts = sorted(random.Random(0).sample(places, count - 1))
    return (0, *(cut * multiple for cut in cuts), seq_len)
