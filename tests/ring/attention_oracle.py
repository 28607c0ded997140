"""Written-out attention in fp64, and the tiles that kernels are tested on.

What a query sees follows from positions alone; which mask a kernel must be told is written beside
it by hand.
"""

from typing import NamedTuple

import torch

from extend.ring.mask import ANTICAUSAL, CAUSAL, FULL, TileMask

SCALE = 0.3


class Case(NamedTuple):
    """Query rows from position `q_start` on meet key rows from `k_start` on."""

    mask: TileMask
    num_queries: int
    num_keys: int
    q_start: int = 0
    k_start: int = 0
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] | None = None  # lengths


SQUARES = {
    "full square": Case(FULL, 20, 20, causal=False),
    "full, few keys": Case(FULL, 20, 10, q_start=10),
    "full, few queries": Case(FULL, 7, 20, q_start=20),
    "full, one key": Case(FULL, 9, 1, q_start=30),
    "causal": Case(CAUSAL, 19, 19),
    "causal, one row": Case(CAUSAL, 1, 1, q_start=5, k_start=5),
    "anti-causal": Case(ANTICAUSAL, 9, 9, q_start=12, k_start=3, window=10),
    "anti-causal, one row": Case(ANTICAUSAL, 1, 1, q_start=9, window=10),
}
BANDS = {
    "window": Case(TileMask(0, 5), 20, 20, window=6),
    "window of one": Case(TileMask(0, 0), 8, 8, window=1),
    "causal from the last": Case(TileMask(lo=-4), 10, 14, q_start=4),
    "causal, many queries": Case(TileMask(lo=0), 18, 6),
    "causal, few queries more": Case(TileMask(lo=0), 7, 6),
    "band": Case(TileMask(-6, 2), 12, 16, q_start=8, k_start=2, window=9),
    "band, many queries": Case(TileMask(-1, 8), 12, 4, q_start=3, k_start=2, window=10),
    "window behind, many queries": Case(TileMask(hi=8), 14, 6, q_start=20, k_start=12, window=17),
    "window behind, many keys": Case(TileMask(hi=0), 5, 12, q_start=20, k_start=9, window=12),
}
LENGTHS = (7, 1, 12)
PACKED = {
    "documents": Case(TileMask(0, None, (0, 7, 8, 20)), 20, 20, documents=LENGTHS),
    "documents, window": Case(TileMask(0, 3, (0, 7, 8, 20)), 20, 20, window=4, documents=LENGTHS),
    "documents, full": Case(
        TileMask(None, None, (0, 7, 8, 20)), 20, 20, causal=False, documents=LENGTHS
    ),
    # Queries behind the keys of the same document: rows i and i of a document are a window apart.
    "documents, anti-causal": Case(TileMask(None, 0, (0, 7, 8, 20)), 20, 20, documents=LENGTHS),
}
CASES = SQUARES | BANDS | PACKED


def allowed(case):
    """bool [sq, sk]: which keys each query sees."""
    queries = case.q_start + torch.arange(case.num_queries).unsqueeze(1)
    keys = case.k_start + torch.arange(case.num_keys)
    seen = torch.ones(case.num_queries, case.num_keys, dtype=torch.bool)
    if case.causal:
        seen = keys <= queries
    if case.mask.hi == 0 and case.documents:
        seen = keys >= queries
    if case.window is not None:
        seen = seen & (keys > queries - case.window)
    if case.documents:
        document = torch.cat([torch.full((n,), i) for i, n in enumerate(case.documents)])
        seen = seen & (document.unsqueeze(1) == document)
    return seen


def make_tensors(num_queries, num_keys, dtype=torch.float64, heads=(4, 2), batch=2, head_dim=8):
    """q, k, v, dout as the ring cuts them: q and dout [b, s, h, d] in memory, k and v side by side
    in one buffer [rows, 2, b, h_kv, d], all of them a slice of more rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, dout = (
        normal(batch, num_queries + 3, heads[0], head_dim).transpose(1, 2)[:, :, 2:-1]
        for _ in range(2)
    )
    buffer = normal(num_keys + 4, 2, batch, heads[1], head_dim)
    k, v = buffer.permute(1, 2, 3, 0, 4)[:, :, :, 3:-1]
    return q, k, v, dout


def run(kernel, q, k, v, dout, mask):
    """out, lse, dq, dk, dv of a kernel; backward gets out and lse as slices of more rows."""
    out, lse = kernel.forward(q, k, v, mask=mask, softmax_scale=SCALE)
    slices = [_slice_of_more(t) for t in (out, lse)]
    return out, lse, *kernel.backward(dout, q, k, v, *slices, mask=mask, softmax_scale=SCALE)


def _slice_of_more(t):
    rows = t.shape[2]
    more = t.new_full((*t.shape[:2], rows + 2, *t.shape[3:]), float("nan"))
    more[:, :, 1:-1] = t
    return more[:, :, 1:-1]


def attention(q, k, v, dout, seen, scale=SCALE):
    """out, lse, dq, dk, dv in fp64, from the definition and autograd."""
    q, k, v = (t.double().clone().requires_grad_() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    grads = torch.autograd.grad(out, (q, k, v), dout.double())
    return out.detach(), scores.logsumexp(-1).detach(), *grads
