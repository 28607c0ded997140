"""Attention written down in fp64, and the inputs that the ring's tests give to it."""

import functools

import torch

from extend.ring import ring_attention, shard, unshard
from tests.ring.attention_oracle import attention

SEQ_LEN, HEAD_DIM, BATCH = 144, 8, 2  # 144 = 9 * 16: divides for 2, 3, 4 and 8 ranks
# Query heads, key heads. 8 for 1, 2, 4 and 8 ranks: under Ulysses "GQA" has two key heads a rank,
# one, and fewer than ranks; 6 for 3 ranks, where it has two a rank after repeating.
HEADS = {
    "MHA": (8, 8), "GQA": (8, 4), "MQA": (8, 1), "6 MHA": (6, 6), "6 GQA": (6, 2), "6 MQA": (6, 1),
    "6:3": (6, 3), "9:3": (9, 3), "12:2": (12, 2),
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
DOCUMENTS = (0, 1, 5, 40, 41, 90, 144)  # tiny and uneven, over and inside every cut
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 13},
    "packed": {"cu_seqlens": DOCUMENTS},
    "packed full": {"cu_seqlens": DOCUMENTS, "causal": False},
    "packed window": {"cu_seqlens": DOCUMENTS, "window": 13},
}
NAMES = ("out", "dq", "dk", "dv")


def visible(seq_len, causal=True, window=None, cu_seqlens=None):
    """bool [seq_len, seq_len]: which key (column) a query (row) sees, from the definition."""
    query, key = torch.arange(seq_len)[:, None], torch.arange(seq_len)[None, :]
    seen = torch.ones(seq_len, seq_len, dtype=torch.bool)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= query - key < window
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(seq_len), torch.tensor(cu_seqlens), right=True)
        seen &= document[:, None] == document[None, :]
    return seen


@functools.cache
def make_inputs(heads, dtype, seq_len=SEQ_LEN):
    """q, k, v and dout, rounded to `dtype`; not to be changed."""
    num_heads, num_kv_heads = HEADS[heads]
    generator = torch.Generator().manual_seed(num_kv_heads)
    return [
        torch.randn(BATCH, h, seq_len, HEAD_DIM, generator=generator, dtype=torch.float64)
        .to(DTYPES[dtype])
        for h in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]  # fmt: skip


def by_definition(q, k, v, dout, seen):
    """out, dq, dk, dv in fp64."""
    out, _, *gradients = attention(q, k, v, dout, seen, scale=q.shape[-1] ** -0.5)
    return out, *gradients


@functools.cache
def exact(heads, dtype, mask):
    """out, dq, dk, dv of the whole sequence in fp64."""
    inputs = (t.double() for t in make_inputs(heads, dtype))
    return by_definition(*inputs, visible(SEQ_LEN, **MASKS[mask]))


@functools.cache
def one_flash_call(heads, dtype, mask):
    """out, dq, dk, dv of torch's own kernel on the whole sequence."""
    q, k, v, dout = make_inputs(heads, dtype)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    dense = mask == "causal"
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=dense, enable_gqa=True,
        attn_mask=None if dense else visible(SEQ_LEN, **MASKS[mask]),
    )  # fmt: skip
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def tolerance(name, heads, dtype, mask):
    """What `name` may be off, absolutely: the design's gate.

    2.5 times what torch's own kernel is off on this machine, and a floor for values of order 1 to
    10: some tens of roundings in fp32, a quarter of one in bf16. No step of the ring may be worse
    than fp64 when the inputs are.
    """
    if dtype == "fp64":
        return 1e-12
    i = NAMES.index(name)
    flash = one_flash_call(heads, dtype, mask)[i].double() - exact(heads, dtype, mask)[i]
    return 2.5 * flash.abs().max().item() + {"bf16": 2e-3, "fp32": 5e-6}[dtype]


def run_ring(rank, world, inputs, **options):
    """out, dq, dk, dv of this rank's part."""
    layout = options.setdefault("layout", "zigzag")
    q, k, v, dout = (shard(t, 2, layout, rank, world) for t in inputs)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = ring_attention(q, k, v, **options)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


def assert_is_attention(shards, heads, seq_len=SEQ_LEN, **mask):
    """Put the fp32 results of all ranks together, from zigzag, and compare them with the oracle."""
    inputs = (t.double() for t in make_inputs(heads, "fp32", seq_len))
    expected = by_definition(*inputs, visible(seq_len, **mask))
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(
            unshard([part[i] for part in shards], 2, "zigzag").double(), expected[i], rtol=0,
            atol=tolerance(name, heads, "fp32", "causal"),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
