"""What ring_attention refuses, and what it says; ranks that disagree, die or are slow."""

import re
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from extend.errors import CompatibilityError, ExtendError, LayoutError, RankError, RecipeError
from extend.ring import RingComm, ring_attention
from extend.ring.attention import attend
from extend.ring.kernels import KERNELS
from extend.ring.kernels.cpu import Reference
from extend.ring.mask import Mask
from tests.ring.test_comm import play
from tests.spawn import spawn


def tensors(q=(1, 4, 8, 8), k=(1, 2, 8, 8), v=None, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in (q, k, v or k)]


def message_of(kind, *args, **options):
    with pytest.raises(kind) as error:
        ring_attention(*args, **options)
    assert isinstance(error.value, ExtendError)
    return str(error.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"k": (1, 3, 8, 8)}, "4 query heads are no multiple of 3 key heads"),
        ({"q": (1, 2, 8, 8), "k": (1, 4, 8, 8)}, "2 query heads are no multiple of 4 key heads"),
        ({"q": (1, 4, 6, 8)}, "q (1, 4, 6, 8), k (1, 2, 8, 8), v (1, 2, 8, 8) do not fit"),
        ({"v": (1, 2, 8, 4)}, "v (1, 2, 8, 4) do not fit; pass q [b, h, s, d]"),
        ({"v": (1, 4, 8, 8)}, "v (1, 4, 8, 8) do not fit"),
        ({"q": (2, 4, 8, 8)}, "q (2, 4, 8, 8), k (1, 2, 8, 8)"),
        ({"q": (4, 8, 8)}, "q (4, 8, 8), k (1, 2, 8, 8), v (1, 2, 8, 8) do not fit"),
        ({"k": (2, 8, 8)}, "k (2, 8, 8), v (2, 8, 8) do not fit"),
        ({"k": (1, 0, 8, 8)}, "k (1, 0, 8, 8), v (1, 0, 8, 8) hold nothing"),
        ({"q": (1, 0, 8, 8)}, "q (1, 0, 8, 8)"),
        ({"q": (0, 4, 8, 8), "k": (0, 2, 8, 8)}, "must be at least 1"),
        ({"q": (1, 4, 8, 0), "k": (1, 2, 8, 0)}, "batch, heads and head_dim must be at least 1"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"cu_seqlens": (0, 3, 8), "window": 2}])
def test_shapes_that_do_not_fit(shapes, message, options):
    # They are looked at before a mask is made of their length.
    assert message in message_of(CompatibilityError, *tensors(**shapes), **options)


def test_tensors_of_another_kind():
    q, k, v = tensors()
    mixed = "k torch.float64 on cpu, v torch.float32 on cpu; cast and move them to one dtype"
    assert mixed in message_of(CompatibilityError, q, k.double(), v)
    assert "k torch.float32 on meta" in message_of(CompatibilityError, q, k.to("meta"), v)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        message = message_of(CompatibilityError, *tensors(dtype=dtype))
        assert message == (
            f"ring_attention: q, k and v of {dtype}; cast them to a floating-point dtype"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "zig-zag"}, "layout: unknown 'zig-zag'; did you mean 'zigzag'?"),
        ({"layout": "ring"}, "layout: unknown 'ring'; choose one of contiguous, zigzag, striped"),
        ({"kernel": "flash-cpu"}, "kernel: unknown 'flash-cpu'; did you mean 'flash_cpu'?"),
        ({"kernel": "atuo"}, "kernel: unknown 'atuo'; did you mean 'auto'?"),
        ({"strategy": "allgather"}, "strategy: unknown 'allgather'; did you mean 'all-gather'?"),
        ({"strategy": "atuo"}, "strategy: unknown 'atuo'; did you mean 'auto'?"),
        ({"strategy": "ups:2"}, "strategy: unknown 'ups'; did you mean 'usp'?"),
        ({"strategy": ""}, "strategy: unknown ''; choose one of auto, ring, all-gather, ulysses, "),
        ({"strategy": "ring:2"}, "strategy: 'ring:2' is not understood; only usp and double-ring"),
        ({"strategy": "auto:2"}, "strategy: 'auto:2' is not understood"),
        ({"strategy": "usp:"}, "strategy: 'usp:' is not understood"),
        ({"strategy": "usp:0"}, "strategy: 'usp:0' is not understood"),
        ({"strategy": "double-ring:-2"}, "strategy: 'double-ring:-2' is not understood"),
        ({"strategy": "usp:2.0"}, "strategy: 'usp:2.0' is not understood"),
    ],
)
def test_names_that_are_not_known(options, message):
    assert message_of(RecipeError, *tensors(), **options).startswith(message)


def test_a_kernel_that_does_not_take_these_tensors():
    message = message_of(CompatibilityError, *tensors(), kernel="flash")
    assert "kernel 'flash' cannot compute q (1, 4, 8, 8) torch.float32 on cpu: " in message
    assert "runs on cuda" in message and "choose one of auto, reference, flash_cpu" in message


@pytest.mark.parametrize(
    ("layout", "local_len", "message"),
    [
        (
            "zigzag",
            7,
            "length 7 must be a multiple of 2 x 1 ranks = 2; use 6 or 8",
        ),
        ("zigzag", 1, "length 1 must be a multiple of 2 x 1 ranks = 2; use 2"),
        ("contiguous", 0, "length 0 must be a multiple of 1 x 1 ranks = 1; use 1"),
    ],
)
def test_lengths_that_do_not_divide(layout, local_len, message):
    q, k, v = tensors((1, 4, local_len, 8), (1, 2, local_len, 8))
    assert message_of(LayoutError, q, k, v, layout=layout) == f"layout {layout!r}: {message}"


@pytest.mark.parametrize(
    ("causal", "window"), [(True, 0), (True, -1), (True, 2.5), (True, "4"), (False, 4)]
)
def test_windows_that_make_no_sense(causal, window):
    message = message_of(CompatibilityError, *tensors(), causal=causal, window=window)
    assert message.startswith(f"ring_attention: window={window} with causal={causal}; a window is")


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ((1, 8), "cu_seqlens (1, 8), 2 boundaries ending at 8, for a sequence of 8 tokens"),
        ((0, 4), "cu_seqlens (0, 4), 2 boundaries ending at 4, for a sequence of 8 tokens"),
        ((0, 9), "ending at 9, for a sequence of 8 tokens; pass strictly rising"),
        ((0, 5, 3, 8), "cu_seqlens (0, 5, 3, 8), 4 boundaries"),
        ((0, 4, 4, 8), "cu_seqlens (0, 4, 4, 8), 4 boundaries"),
        ((), "cu_seqlens (), 0 boundaries ending at nothing"),
        (torch.tensor([0, 4], dtype=torch.int32), "cu_seqlens (0, 4), 2 boundaries ending at 4"),
        (torch.tensor([0.0, 8.0]), "cu_seqlens has shape (2,) and dtype torch.float32"),
        (torch.tensor([[0, 8]]), "cu_seqlens has shape (1, 2) and dtype torch.int64"),
        ((0, 4.5, 8), "cu_seqlens (0, 4.5, 8) is no row of whole numbers ('float' object"),
        (((0, 4), (4, 8)), "cu_seqlens ((0, 4), (4, 8)) is no row of whole numbers"),
        (8, "cu_seqlens 8 is no row of whole numbers"),
        ("08", "cu_seqlens 08 is no row of whole numbers"),
    ],
)
def test_boundaries_that_do_not_fit_the_sequence(cu_seqlens, message):
    assert message in message_of(CompatibilityError, *tensors(), cu_seqlens=cu_seqlens)


# What rank 0 and rank 1 pass, and how the message names it.
DISAGREE = {
    "length": (
        {"local_len": 8}, {"local_len": 16},
        "q: (1, 4, 8, 8) (rank 0), (1, 4, 16, 8) (rank 1); "
        "k: (1, 2, 8, 8) (rank 0), (1, 2, 16, 8) (rank 1)",
    ),
    "key heads": (
        {"kv_heads": 2}, {"kv_heads": 4}, "k: (1, 2, 8, 8) (rank 0), (1, 4, 8, 8) (rank 1)"
    ),
    "dtype": (
        {"dtype": torch.float32}, {"dtype": torch.bfloat16},
        "dtype: 'torch.float32' (rank 0), 'torch.bfloat16' (rank 1)",
    ),
    "layout": (
        {"layout": "zigzag"}, {"layout": "striped"}, "layout: 'zigzag' (rank 0), 'striped' (rank 1)"
    ),
    "window": (
        {"window": 3}, {"window": 4},
        "mask: Mask(causal=True, window=3, cu_seqlens=None) (rank 0), "
        "Mask(causal=True, window=4, cu_seqlens=None) (rank 1)",
    ),
    "documents": (
        {"cu_seqlens": (0, 5, 16)}, {},
        "mask: Mask(causal=True, window=None, cu_seqlens=(0, 5, 16)) (rank 0), "
        "Mask(causal=True, window=None, cu_seqlens=None) (rank 1)",
    ),
    "causal": (
        {"causal": False}, {},
        "mask: Mask(causal=False, window=None, cu_seqlens=None) (rank 0), "
        "Mask(causal=True, window=None, cu_seqlens=None) (rank 1)",
    ),
    "strategy": (
        {"strategy": "ring"}, {"strategy": "ulysses"},
        "strategy: 'ring' (rank 0), 'ulysses' (rank 1)",
    ),
    "kernel": (
        {"kernel": "auto"}, {"kernel": "reference"}, "kernel: 'auto' (rank 0), 'reference' (rank 1)"
    ),
    "scale": (
        {"softmax_scale": 0.5}, {"softmax_scale": 0.25},
        "softmax_scale: 0.5 (rank 0), 0.25 (rank 1)",
    ),
}  # fmt: skip


def call(local_len=8, kv_heads=2, dtype=torch.float32, **options):
    shapes = (1, 4, local_len, 8), (1, kv_heads, local_len, 8)
    return ring_attention(*tensors(*shapes, dtype=dtype), **options)


def disagree(rank, world):
    messages = {}
    for name, case in DISAGREE.items():
        with pytest.raises(CompatibilityError) as error:
            call(**case[rank])
        messages[name] = str(error.value)
    call()  # and afterwards all is well again
    return messages


class TakesBandsSomewhere(Reference):
    """A kernel whose trial fails on the first rank alone."""

    @property
    def bands(self):
        return dist.get_rank() > 0


def kernels_differ(rank, world):
    KERNELS["some"] = TakesBandsSomewhere()
    with pytest.raises(CompatibilityError) as error:
        call(kernel="some")
    return str(error.value)


def test_ranks_whose_kernels_take_different_tiles_are_told():
    first, second = spawn(2, kernels_differ)
    assert first == second
    assert "disagree about takes_bands: False (rank 0), True (rank 1)" in first


def test_ranks_that_disagree_are_all_told_about_what():
    first, second = spawn(2, disagree)
    assert first == second
    for name, (_, _, difference) in DISAGREE.items():
        assert first[name] == (
            f"ring_attention: the ranks disagree about {difference}; call it with the same shapes "
            "and options on every rank of the group"
        )


def one_rank_refuses(rank, world):
    """What is wrong on one rank only, it says itself; the others find that it does not come."""
    comm = RingComm(timeout_seconds=0.5)
    local_len = 7 if rank == 1 else 8
    with pytest.raises((LayoutError, RankError)) as error:
        attend(*tensors((1, 4, local_len, 8), (1, 2, local_len, 8)), comm=comm)
    dist.barrier()
    return str(error.value)


def test_a_length_that_is_wrong_on_one_rank():
    waiting, wrong = spawn(2, one_rank_refuses)
    assert wrong.startswith("layout 'zigzag': length 14 must be a multiple of 2 x 2 ranks = 4; ")
    assert "use 12 or 16" in wrong
    assert "rank 0: rank 1 of ranks 0, 1 did not call ring_attention within 0.5 s" in waiting


def attend_everywhere(comm, strategy):
    """No mask, so that every rank waits for every other."""
    q, k, v = (t.requires_grad_() for t in tensors((1, 3, 8, 8), (1, 3, 8, 8)))
    return attend(q, k, v, comm=comm, mask=Mask(causal=False), strategy=strategy)


def dies_before_its_call(rank, world, await_end_of):
    dist.barrier()
    if rank == 2:
        raise SystemExit
    attend_everywhere(RingComm(timeout_seconds=1), "ring")


def test_a_rank_that_dies_before_its_first_call(tmp_path):
    *others, dead = play(dies_before_its_call, 3, tmp_path)
    assert not dead
    for rank, message in enumerate(others):
        assert message.startswith(
            f"rank {rank}: rank 2 of ranks 0, 1, 2 did not call ring_attention within 1 s; it died"
        )


def dies_later(strategy, backward, pause, rank, world, await_end_of):
    comm = RingComm(timeout_seconds=30)
    out = attend_everywhere(comm, strategy)
    if backward:
        out.sum().backward()
    if rank == 2:
        raise SystemExit
    time.sleep(pause)
    if backward:
        attend_everywhere(comm, strategy)
    else:
        out.sum().backward()


@pytest.mark.parametrize(
    ("backward", "pause"),
    [
        pytest.param(False, 0, id="before backward"),
        pytest.param(True, 0, id="before the next call"),
        pytest.param(True, 0.3, id="long before the next call"),  # its connections are closed then
    ],
)
@pytest.mark.parametrize("strategy", ["ring", "all-gather", "ulysses"])
def test_a_rank_that_dies_later(tmp_path, strategy, backward, pause):
    *others, _ = play(partial(dies_later, strategy, backward, pause), 3, tmp_path)
    for rank, message in enumerate(others):
        # Long before the time-out.
        assert re.match(
            rf"rank {rank} has not heard from rank 2 after \d\.\d s, fetching ", message
        )
        assert "it died, hangs, or is slower than the time-out of 30 s" in message


def is_slow(rank, world, await_end_of):
    attend_everywhere(RingComm(), "ring")
    if rank == 1:
        await_end_of([0, 2])
    else:
        attend_everywhere(RingComm(timeout_seconds=1), "ring")


def test_a_rank_that_is_slow(tmp_path):
    first, slow, last = play(is_slow, 3, tmp_path)
    assert not slow
    for rank, message in ((0, first), (2, last)):
        assert re.match(rf"rank {rank} has not heard from rank 1 after \d\.\d s, ", message)
        assert "time-out of 1 s" in message and "raise the time-out" in message
