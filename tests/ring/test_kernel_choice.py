import pytest
import torch
from torch.nn import attention as torch_attention

from extend.errors import CompatibilityError
from extend.ring.kernels import KERNELS, choose_kernel, measure
from extend.ring.kernels import choose as choosing
from extend.ring.mask import Mask
from tests.ring.attention_oracle import make_tensors

DENSE, PACKED = Mask(), Mask(cu_seqlens=(0, 3, 8))
WINDOW, LONG_WINDOW = Mask(window=512), Mask(window=2048)


class Fake:
    def __init__(self, bands=True, packed=True, reason=None):
        self.bands, self.packed, self.reason = bands, packed, reason

    def refuse(self, q, k):
        return self.reason


@pytest.fixture
def family(monkeypatch):
    """Kernels with made-up times in place of the real ones; the list of what was timed."""

    class Family(list):
        def __init__(self):
            super().__init__()
            self.times = {}

        def add(self, name, milliseconds, **options):
            kernel = Fake(**options)
            self.times[kernel] = name, milliseconds
            KERNELS[name] = kernel
            choosing.CANDIDATES["cpu"] = (*choosing.CANDIDATES["cpu"], name)
            return kernel

        def time(self, kernel, q, k, mask):
            name, milliseconds = self.times[kernel]
            self.append(name)
            if isinstance(milliseconds, Exception):
                raise milliseconds
            return milliseconds

    family = Family()
    for name in list(KERNELS):
        monkeypatch.delitem(KERNELS, name)
    monkeypatch.setitem(choosing.CANDIDATES, "cpu", ())
    monkeypatch.setattr(choosing, "_chosen", {})
    monkeypatch.setattr(choosing, "time_kernel", family.time)
    yield family
    KERNELS.clear()  # monkeypatch puts the real ones back


def choose(mask=DENSE, name="auto", dtype=torch.float32, heads=(4, 2), head_dim=8, rows=8, **more):
    q, k, _, _ = make_tensors(rows, rows, dtype, heads, head_dim=head_dim)
    return choose_kernel(name, q, k, mask=mask, **more)


def test_auto_on_cpu_is_flash():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert choose(dtype=dtype, head_dim=20) is KERNELS["flash_cpu"]


def test_the_fastest_is_measured_once_for_each_signature(family):
    family.add("slow", 3.0)
    quick = family.add("quick", 1.5)
    family.add("middling", 2.0)
    assert choose() is quick
    assert family == ["slow", "quick", "middling"]
    assert choose() is quick and choose(rows=12) is quick  # lengths are no part of it
    assert choose(heads=(6, 3)) is quick  # nor the number of heads, only their ratio
    assert choose(Mask(cu_seqlens=(0, 8, 12)), rows=12) is quick
    assert len(family) == 6
    assert choose(PACKED) is quick
    assert len(family) == 6
    for different in (
        {"dtype": torch.bfloat16}, {"head_dim": 16}, {"heads": (4, 4)}, {"group": "other ranks"},
        {"mask": Mask(causal=False)}, {"mask": WINDOW}, {"mask": Mask(window=513)},
    ):  # fmt: skip
        before = len(family)
        choose(**different)
        assert len(family) == before + 3, different


def test_a_name_is_not_measured(family):
    slow = family.add("slow", 3.0, bands=False, packed=False)
    family.add("quick", 1.0)
    for mask in (DENSE, WINDOW, PACKED):
        assert choose(mask, name="slow") is slow
    assert not family


def test_who_refuses_is_not_timed(family):
    family.add("absent", 1.0, reason="needs a package")
    family.add("slow", 3.0)
    quick = family.add("quick", 2.0)
    assert choose() is quick
    assert family == ["slow", "quick"]


def test_the_only_one_is_not_timed(family):
    family.add("absent", 1.0, reason="needs a package")
    only = family.add("only", 2.0)
    assert choose() is only
    assert not family


def test_all_reasons_are_given(family):
    family.add("one", 1.0, reason="needs a package")
    family.add("two", 1.0, reason="takes float16")
    message = (
        r"kernel 'auto' cannot compute q \(2, 4, 8, 8\) torch.float32 on cpu: one needs a package; "
        r"two takes float16\. Cast or move .* choose one of auto, one, two"
    )
    with pytest.raises(CompatibilityError, match=message):
        choose()


@pytest.mark.parametrize(
    ("mask", "timed"),
    [
        (DENSE, ["bands", "squares", "other"]),
        (WINDOW, ["bands", "other"]),
        (Mask(window=2047), ["bands", "other"]),
        (LONG_WINDOW, ["bands", "squares", "other"]),
    ],
)
def test_a_kernel_without_bands_competes_only_for_long_windows(family, mask, timed):
    family.add("bands", 3.0)
    squares = family.add("squares", 1.0, bands=False, packed=False)
    other = family.add("other", 2.0)
    assert choose(mask) is (squares if "squares" in timed else other)
    assert family == timed


def test_a_kernel_without_bands_packs_a_short_window_if_it_can(family):
    packed = family.add("packed", 1.0, bands=False)
    family.add("other", 2.0)
    assert choose(WINDOW) is packed


def test_a_kernel_without_packing_does_not_compete_for_documents(family):
    packed = family.add("packed", 3.0)
    family.add("one by one", 1.0, packed=False)
    assert choose(PACKED) is packed
    assert choose(DENSE) is KERNELS["one by one"]


def test_many_calls_are_better_than_none(family):
    slow = family.add("slow", 3.0, bands=False, packed=False)
    quick = family.add("quick", 2.0, bands=False, packed=False)
    assert choose(WINDOW) is quick and choose(PACKED) is quick
    quick.reason = "is out"
    assert choose(Mask(window=9)) is slow


def test_a_kernel_that_fails_when_timed_is_out(family):
    family.add("broken", RuntimeError("out of memory"))
    sound = family.add("sound", 2.0)
    assert choose() is sound
    family.add("worse", ValueError("no such thing"))
    sound.reason = "is out"
    with pytest.raises(CompatibilityError) as error:
        choose(head_dim=16)
    assert "broken fails here (RuntimeError: out of memory)" in str(error.value)
    assert "worse fails here (ValueError: no such thing)" in str(error.value)
    assert "sound is out" in str(error.value)


def test_ranks_agree_on_the_least_sum(family):
    family.add("absent", 0.5, reason="needs a package")
    family.add("here", 1.0)
    there = family.add("there", 2.0)
    asked = []

    def agree(times):  # on the other rank "here" is slow
        asked.append(times.clone())
        return times + torch.tensor([0.5, 4.0, 1.0], dtype=times.dtype)

    assert choose(agree=agree, group="both") is there
    assert choose(agree=agree, group="both") is there
    expected = torch.tensor([float("inf"), 1.0, 2.0], dtype=torch.float64)
    assert len(asked) == 1
    torch.testing.assert_close(asked[0], expected, rtol=0, atol=0)
    assert choose() is KERNELS["here"]  # alone


def test_ranks_agree_where_one_has_a_single_kernel(family):
    shared = family.add("shared", 3.0)
    family.add("absent", 1.0, reason="needs a package")
    asked = []

    def agree(times):  # the other rank has both, and times them
        asked.append(times.tolist())
        return times + torch.tensor([3.0, 1.0], dtype=times.dtype)

    assert choose(agree=agree, group="both") is shared
    assert asked == [[0.0, float("inf")]] and not family


def test_no_kernel_on_every_rank_is_an_error_on_every_rank(family):
    family.add("here", 1.0)
    family.add("there", 1.0, reason="needs a package")

    def agree(times):
        return times + torch.tensor([float("inf"), 0.0], dtype=times.dtype)

    match = "here is not for every rank; there needs a package"
    for _ in range(2):  # and not remembered
        with pytest.raises(CompatibilityError, match=match):
            choose(agree=agree, group="both")


def test_measuring_leaves_the_flash_version_of_the_process_alone(family, monkeypatch):
    class Handle:
        def remove(self):
            pass

    monkeypatch.setitem(torch_attention._registry._FLASH_ATTENTION_IMPLS, "FA4", Handle)
    family.add("one", 1.0)
    family.add("two", 2.0)

    def activate(kernel, *_):
        torch_attention.activate_flash_attention_impl("FA4")
        return 1.0

    monkeypatch.setattr(choosing, "time_kernel", activate)
    choose()
    assert torch_attention.current_flash_attention_impl() is None


# The representative block.


@pytest.mark.parametrize(
    ("mask", "sample", "seq_len"),
    [
        (Mask(), Mask(), 4096),
        (Mask(causal=False), Mask(causal=False), 4096),
        (Mask(window=512), Mask(window=512), 4096),
        (Mask(window=3000), Mask(window=3000), 6000),
        (Mask(window=50_000), Mask(window=4096), 8192),
    ],
)
def test_sample_mask_is_of_the_same_kind(mask, sample, seq_len):
    assert measure.sample_mask(mask) == (sample, seq_len)


def test_sample_of_documents_is_four_of_uneven_length():
    mask, seq_len = measure.sample_mask(Mask(window=700, cu_seqlens=tuple(range(0, 10_000, 100))))
    assert (mask.causal, mask.window, seq_len) == (True, 700, 4096)
    bounds = torch.tensor(mask.cu_seqlens)
    assert len(bounds) == 5 and bounds[0] == 0 and bounds[-1] == 4096
    assert len(set(bounds.diff().tolist())) == 4 and (bounds.diff() > 0).all()


class Counting:
    """Computes nothing and remembers which (query, key) pairs it was asked for."""

    def __init__(self, bands, packed):
        self.bands, self.packed = bands, packed
        self.forwards, self.backwards, self.tensors = 0, 0, []

    def forward(self, q, k, v, *, mask, softmax_scale):
        assert (self.packed or mask.cu_seqlens is None) and softmax_scale == 8**-0.5
        self.forwards += self._pairs(mask, q.shape[2], k.shape[2])
        self.tensors += [q, k, v]
        return torch.empty_like(q), torch.empty(q.shape[:3])

    def backward(self, dout, q, k, v, out, lse, *, mask, softmax_scale):
        assert dout.shape == out.shape == q.shape and lse.shape == q.shape[:3]
        self.backwards += self._pairs(mask, q.shape[2], k.shape[2])
        return q, k, v

    def _pairs(self, mask, num_queries, num_keys):
        gaps = torch.arange(num_queries).unsqueeze(1) - torch.arange(num_keys)
        seen = gaps >= (-99 if mask.lo is None else mask.lo)
        seen &= gaps <= (99 if mask.hi is None else mask.hi)
        if mask.cu_seqlens:
            lengths = torch.tensor(mask.cu_seqlens).diff().tolist()
            seen &= torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
        return int(seen.sum())


@pytest.mark.parametrize("bands", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_timed_is_every_pair_of_the_sample_once(monkeypatch, bands, packed):
    monkeypatch.setattr(measure, "ROWS", 40)
    q, k, _, _ = make_tensors(8, 8, torch.bfloat16, heads=(6, 2))
    runs = measure.WARM_UPS + measure.RUNS
    triangle, lengths = 40 * 41 // 2, (16, 3, 14, 7)
    for mask, pairs in (
        (Mask(), triangle),
        (Mask(causal=False), 1600),
        (Mask(window=40), 40 * 41 // 2 + 40 * 40),  # 80 rows
        (Mask(cu_seqlens=(0, 4, 8)), sum(n * (n + 1) // 2 for n in lengths)),
    ):
        kernel = Counting(bands, packed)
        assert measure.time_kernel(kernel, q, k, mask) > 0
        assert kernel.forwards == kernel.backwards == runs * pairs, mask
        assert all(t.dtype == torch.bfloat16 and t.shape[0] == 1 for t in kernel.tensors)
        queries, keys, values = kernel.tensors[:3]
        assert (queries.shape[1], keys.shape[1], keys.shape[3]) == (30, 10, 8)
        # as the ring hands them over: heads in a row, keys and values side by side
        assert queries.stride()[1:] == (8, 30 * 8, 1)
        assert keys.stride()[1:] == values.stride()[1:] == (8, 2 * 10 * 8, 1)


def test_what_a_mask_does_not_need_is_not_asked(monkeypatch):
    monkeypatch.setattr(measure, "ROWS", 16)

    class Reluctant(Counting):
        bands = packed = property(lambda self: pytest.fail("asked"), lambda self, value: None)

        def forward(self, q, k, v, *, mask, softmax_scale):
            return torch.empty_like(q), torch.empty(q.shape[:3])

    q, k, _, _ = make_tensors(8, 8)
    assert measure.time_kernel(Reluctant(True, True), q, k, Mask()) > 0


def test_time_is_the_least_after_the_warm_up(monkeypatch):
    monkeypatch.setattr(measure, "ROWS", 16)
    clock = iter([0.1, 0.2, 5.0, 3.0, 4.0, 9.0, 7.0])
    monkeypatch.setattr(measure, "_milliseconds", lambda call, device: next(clock))
    q, k, _, _ = make_tensors(8, 8)
    assert measure.time_kernel(Counting(True, True), q, k, Mask()) == 3.0


def test_measured_on_real_kernels(monkeypatch):
    # Nothing is made up: both kernels of the CPU, timed, on a small sample.
    monkeypatch.setattr(measure, "ROWS", 64)
    monkeypatch.setattr(choosing, "_chosen", {})
    monkeypatch.setitem(choosing.CANDIDATES, "cpu", ("reference", "flash_cpu"))
    for mask in (DENSE, LONG_WINDOW):
        assert choose(mask) in (KERNELS["reference"], KERNELS["flash_cpu"])
    assert choose(PACKED) is KERNELS["reference"] and choose(WINDOW) is KERNELS["reference"]
