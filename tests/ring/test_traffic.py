"""What strategies hold and what they send: memory of the local length, no fetch without a use."""

from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from extend.ring import LAYOUTS, ring_attention, shard
from extend.ring.strategies import allgather, ring
from tests.ring.oracle import (
    BATCH,
    HEAD_DIM,
    HEADS,
    SEQ_LEN,
    assert_is_attention,
    make_inputs,
    run_ring,
)
from tests.spawn import spawn


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


def record_sizes(rank, world, local_len, strategy):
    """By layout: the largest tensor on the way and all that the backward pass keeps, in numbers."""
    found = {}
    for layout in LAYOUTS:
        q, k, v = (torch.randn(1, 4, local_len, 8, requires_grad=True) for _ in range(3))
        saved = []

        def keep(t, saved=saved):
            saved.append(t.numel())
            return t

        with Sizes() as sizes:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                out = ring_attention(q, k, v, layout=layout, strategy=strategy)
            out.backward(torch.ones_like(out))
        found[layout] = sizes.largest, sorted(saved)
    return found


@pytest.mark.parametrize("strategy", ["ring", "double-ring:2"])
def test_memory_is_that_of_the_local_length(strategy):
    local_len, heads, head_dim = 256, 4, 8
    # Keys and values of all local positions in one buffer: nothing longer, nothing squared.
    largest = 2 * heads * local_len * head_dim
    saved = [heads * local_len] + 4 * [heads * local_len * head_dim]  # lse; q, k, v, out
    for found in spawn(4, record_sizes, local_len, strategy):
        assert found == dict.fromkeys(LAYOUTS, (largest, saved))


class Held:
    """Counts what a method that fetches keys has handed out and is still in memory."""

    def __init__(self, owner, method):
        honest, self.refs, self.most, self.largest = getattr(owner, method), [], 0, 0

        def fetch(*args):
            transfer, keys = honest(*args)
            if keys is not None:
                self.refs.append(StorageWeakRef(keys.untyped_storage()))
                self.most = max(self.most, sum(not ref.expired() for ref in self.refs))
                self.largest = max(self.largest, keys.nbytes)
            return transfer, keys

        setattr(owner, method, fetch)


def hold_blocks(rank, world):
    held = Held(ring.Ring, "_fetch")
    run_ring(rank, world, make_inputs("MHA", "fp32"), strategy="ring", kernel="flash_cpu")
    return len(held.refs), held.most


def test_a_ring_holds_two_blocks_of_other_ranks():
    assert spawn(4, hold_blocks) == 4 * [(2 * 3, 2)]  # forward and backward


def offer_rows(rank, world, strategy):
    """By layout, the rows of every block of keys that the ring publishes."""
    found, publish = {}, ring.publish_block
    for layout in LAYOUTS:
        rows = found[layout] = []

        def note(comm, lane, like, k, v, rows=rows):
            if lane == "keys":
                rows.append(like.shape[2])
            return publish(comm, lane, like, k, v)

        ring.publish_block = note
        q, k, v = (torch.randn(1, 4, 32, 8, requires_grad=True) for _ in range(3))
        ring_attention(q, k, v, layout=layout, window=5, strategy=strategy).sum().backward()
    return found


@pytest.mark.parametrize(
    ("strategy", "turns", "zigzag"),
    [
        ("ring", 1, 20),  # a rank has two pieces, each wanted by another rank: 4 rows, 16, 4 rows
        ("double-ring:2", 2, 4),  # inside a host only one of them is
    ],
)
def test_a_ring_offers_only_what_is_in_reach_of_a_window(strategy, turns, zigzag):
    """4 of 32 rows before a boundary; striped rows are all near one."""
    for found in spawn(4, offer_rows, strategy):
        assert len(found["contiguous"]) == 2 * turns  # forward and backward
        assert max(found["contiguous"]) == 4
        assert max(found["zigzag"]) == zigzag
        assert max(found["striped"]) == 32


def gather_in_groups(rank, world, kernel, limits):
    """What came out under each limit, and (groups gathered, held at once, bytes of the largest)."""
    results, found = [], []
    for limit in limits:
        allgather.GATHERED_BYTES = limit
        held = Held(allgather.AllGather, "_gather")
        inputs = make_inputs("MHA", "fp32")
        results.append(run_ring(rank, world, inputs, strategy="all-gather", kernel=kernel))
        found.append((len(held.refs), held.most, held.largest))
    return results, found


@pytest.mark.parametrize("kernel", ["reference", "flash_cpu"])
def test_gathered_memory_is_bounded_by_groups_of_heads(kernel):
    whole = 2 * make_inputs("MHA", "fp32")[1].nbytes  # all keys and values, of 8 heads
    limits = [whole, whole // 2, whole // 3, whole // 8]
    by_rank = spawn(4, gather_in_groups, kernel, limits)
    # A divisor of 8, and at least two where no own block hides the gathering.
    groups = [2 if kernel == "reference" else 1, 2, 4, 8]
    for i, (limit, num_groups) in enumerate(zip(limits, groups, strict=True)):
        assert_is_attention([results[i] for results, _ in by_rank], "MHA")
        for _, found in by_rank:
            gathered, held_at_once, largest = found[i]
            assert gathered == 2 * num_groups  # forward and backward
            assert held_at_once <= 2 and largest <= limit


class Sends(TorchDispatchMode):
    """Counts bytes by receiver."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d.send.default:
            tensors, _, receiver, _ = args
            self.bytes[receiver] += sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def count_rows(rank, world, strategy, kernel):
    """By case the key rows sent to each rank, in the forward and in the backward pass."""
    of_row = 2 * BATCH * HEADS["GQA"][1] * HEAD_DIM * 4  # K and V, or the gradients of both
    found = {}
    for name, (layout, options, _) in SENT.items():
        q, k, v, dout = (shard(t, 2, layout, rank, world) for t in make_inputs("GQA", "fp32"))
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        with Sends() as forward:
            out = ring_attention(
                q, k, v, strategy=strategy, kernel=kernel, layout=layout, **options
            )
        with Sends() as backward:
            out.backward(dout)
        found[name] = [
            [sends.bytes[to] / of_row for to in range(world)] for sends in (forward, backward)
        ]
    return found


N = SEQ_LEN // 4  # rows of a rank
H = N // 2  # rows of a piece in zigzag
SENT = {  # layout, mask and how many key rows rank r (row) sends to each rank (column)
    "contiguous": ("contiguous", {}, [[0, N, N, N], [0, 0, N, N], [0, 0, 0, N], [0, 0, 0, 0]]),
    # Later ranks see the first half, earlier ones both halves, by the second half of their queries.
    "zigzag": ("zigzag", {}, [[0, H, H, H], [N, 0, H, H], [N, N, 0, H], [N, N, N, 0]]),
    # The last key of a later rank comes after all queries.
    "striped": (
        "striped", {},
        [[0, N, N, N], [N - 1, 0, N, N], [N - 1, N - 1, 0, N], [N - 1, N - 1, N - 1, 0]],
    ),
    "full": (
        "contiguous", {"causal": False}, [[0, N, N, N], [N, 0, N, N], [N, N, 0, N], [N, N, N, 0]],
    ),
    "window": (
        "contiguous", {"window": 13}, [[0, 12, 0, 0], [0, 0, 12, 0], [0, 0, 0, 12], [0, 0, 0, 0]],
    ),
    "window over a rank": (
        "contiguous", {"window": N + 4}, [[0, N, 3, 0], [0, 0, N, 3], [0, 0, 0, N], [0, 0, 0, 0]],
    ),
    # Both neighbours of a rank hold the piece before one of its own.
    "zigzag, window": (
        "zigzag", {"window": 13}, [[0, 12, 0, 0], [12, 0, 12, 0], [0, 12, 0, 12], [0, 0, 12, 0]],
    ),
    # Two documents end with their ranks, the third is on two ranks.
    "documents": (
        "contiguous", {"cu_seqlens": (0, N, 2 * N, 4 * N)},
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, N], [0, 0, 0, 0]],
    ),
    # The second document begins in the middle of rank 1.
    "documents, uneven": (
        "contiguous", {"cu_seqlens": (0, N + H, 4 * N)},
        [[0, N, 0, 0], [0, 0, H, H], [0, 0, 0, N], [0, 0, 0, 0]],
    ),
    "zigzag, a document a piece": (
        "zigzag", {"cu_seqlens": tuple(range(0, 4 * N + 1, H))}, [[0, 0, 0, 0]] * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["reference", "flash_cpu"])
@pytest.mark.parametrize("strategy", ["ring", "all-gather"])
def test_no_row_travels_without_a_use(strategy, kernel):
    by_rank = spawn(4, count_rows, strategy, kernel)
    for name, (_, _, keys) in SENT.items():
        assert [found[name][0] for found in by_rank] == keys, name
        # Backward: the keys once more, and a share of their gradients from everyone who had them.
        both = [[keys[r][to] + keys[to][r] for to in range(4)] for r in range(4)]
        assert [found[name][1] for found in by_rank] == both, name


# Hosts of ranks 0, 1 and 2, 3. What comes from the other host is handed on to the neighbour.
ACROSS = {  # (forward, backward)
    "full": (
        [[0, 2 * N, N, 0], [2 * N, 0, 0, N], [N, 0, 0, 2 * N], [0, N, 2 * N, 0]],
        [[0, 4 * N, 2 * N, 0], [4 * N, 0, 0, 2 * N], [2 * N, 0, 0, 4 * N], [0, 2 * N, 4 * N, 0]],
    ),
    "contiguous": (  # nothing goes back to the first host but the gradients
        [[0, N, N, 0], [0, 0, 0, N], [0, 0, 0, 2 * N], [0, 0, N, 0]],
        [[0, N, N, 0], [N, 0, 0, N], [N, 0, 0, 3 * N], [0, N, 3 * N, 0]],
    ),
    "zigzag": (  # the second host sees the first halves of the first one's keys
        [[0, H + N, H, 0], [2 * N, 0, 0, H], [N, 0, 0, 2 * H], [0, N, N + H, 0]],
        [[0, 7 * H, 3 * H, 0], [7 * H, 0, 0, 3 * H], [3 * H, 0, 0, 5 * H], [0, 3 * H, 5 * H, 0]],
    ),
    "window": (  # rank 2 gets the rows of rank 1 from rank 3, which is in its place
        [[0, 12, 0, 0], [0, 0, 0, 12], [0, 0, 0, 12], [0, 0, 12, 0]],
        [[0, 12, 0, 0], [12, 0, 0, 12], [0, 0, 0, 24], [0, 12, 24, 0]],
    ),
    "documents": (
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, N], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, N], [0, 0, N, 0]],
    ),
}


def test_a_double_ring_crosses_to_another_host_once():
    by_rank = spawn(4, count_rows, "double-ring:2", "flash_cpu")
    for name, tables in ACROSS.items():
        assert tuple([found[name][i] for found in by_rank] for i in range(2)) == tables, name
