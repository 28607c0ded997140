"""FlashAttention on operators that stand in for torch's: a GPU is not needed for the arithmetic.

The stand-in understands lengths and windows as torch's flash_api.cpp does, with what version 2 does
to windows that are not below the number of keys. That is where a wrong argument would be silent.
"""

import contextlib

import pytest
import torch
from torch.nn import attention as torch_attention

from extend.ring.kernels import KERNELS, flash
from extend.ring.kernels.flash import Flash
from extend.ring.mask import ANTICAUSAL, CAUSAL, TileMask
from tests.ring.attention_oracle import (
    CASES,
    PACKED,
    SQUARES,
    allowed,
    attention,
    make_tensors,
    run,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class StandIn:
    """`aten._flash_attention_*` on CPU. `refuses_windows`: as FA4 under torch 2.11, backward."""

    def __init__(self, refuses_windows=False):
        self.refuses_windows = refuses_windows
        self.calls = []  # (version, received tensors)

    def _flash_attention_forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, **window
    ):
        assert dropout == 0 and not debug
        self.calls.append((torch_attention.current_flash_attention_impl(), (q, k, v)))
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:-1]).transpose(-2, -1).contiguous()  # [b, h, s] or [h, s]
        for at, seen in self._parts(q, k, cu_q, cu_k, max_q, max_k, causal, window):
            scores, value = self._scores(q, k, v, at, seen, scale)
            stats = scores.logsumexp(-1)
            mean = (scores - stats[..., None]).exp() @ value
            self._rows(out, at[0]).copy_(mean.transpose(-3, -2))
            self._stats(lse, at[0]).copy_(stats)
        return out, lse, None, None, None

    def _flash_attention_backward(
        self, dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused,
        *, scale, **window,
    ):  # fmt: skip
        assert dropout == 0 and lse.is_contiguous() and state.dtype == torch.uint64
        if self.refuses_windows and window:
            raise RuntimeError("backward: windowed attention not supported\nsecond line")
        self.calls.append((torch_attention.current_flash_attention_impl(), (q, k, v)))
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        group = q.shape[-2] // k.shape[-2]
        for at, seen in self._parts(q, k, cu_q, cu_k, max_q, max_k, causal, window):
            scores, value = self._scores(q, k, v, at, seen, scale)
            ours = [self._rows(t, at[0]).transpose(-3, -2) for t in (dout, out, q)]
            key = self._rows(k, at[1]).transpose(-3, -2).repeat_interleave(group, -3)
            weights = (scores - self._stats(lse, at[0])[..., None]).exp()
            mean = (ours[0] * ours[1]).sum(-1, keepdim=True)
            ds = weights * (ours[0] @ value.mT - mean) * scale
            self._rows(dq, at[0]).add_((ds @ key).transpose(-3, -2))
            for grad, wide in ((dk, ds.mT @ ours[2]), (dv, weights.mT @ ours[0])):
                summed = wide.unflatten(-3, (-1, group)).sum(-3).transpose(-3, -2)
                self._rows(grad, at[1]).add_(summed)
        return dq, dk, dv

    def _parts(self, q, k, cu_q, cu_k, max_q, max_k, causal, window):
        """((query rows, key rows), visible) of each sequence of a call."""
        assert all(t.stride(-1) == 1 for t in (q, k)) and (q.ndim == 3) == (cu_q is not None)
        if cu_q is None:
            assert (max_q, max_k) == (q.shape[1], k.shape[1])
            spans = [(slice(0, max_q), slice(0, max_k))]
        else:
            assert cu_q.dtype == cu_k.dtype == torch.int32
            bounds = cu_q.tolist(), cu_k.tolist()
            assert bounds[0][-1] == q.shape[0] and bounds[1][-1] == k.shape[0]
            starts, stops = zip(*(b[:-1] for b in bounds)), zip(*(b[1:] for b in bounds))
            spans = [
                (slice(a, c), slice(b, d)) for (a, b), (c, d) in zip(starts, stops, strict=True)
            ]
        left, right = window.get("window_size_left", -1), window.get("window_size_right", -1)
        for at in spans:
            num_queries, num_keys = (rows.stop - rows.start for rows in at)
            assert num_queries <= max_q and num_keys <= max_k
            yield at, self._visible(num_queries, num_keys, causal, left, right, max_k)

    def _visible(self, num_queries, num_keys, causal, left, right, max_k):
        if torch_attention.current_flash_attention_impl() is None:  # version 2
            left, right = (-1 if size >= max_k else size for size in (left, right))
        right = 0 if causal else right
        if torch_attention.current_flash_attention_impl() is None:
            left = max_k if left < 0 <= right else left
            right = max_k if right < 0 <= left else right
        last = torch.arange(num_queries).unsqueeze(1) + num_keys - num_queries
        keys = torch.arange(num_keys)
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
        seen &= keys <= last + right if right >= 0 else seen
        return seen & (keys >= last - left) if left >= 0 else seen

    def _scores(self, q, k, v, at, seen, scale):
        group = q.shape[-2] // k.shape[-2]
        query = self._rows(q, at[0]).transpose(-3, -2)
        key, value = (
            self._rows(t, at[1]).transpose(-3, -2).repeat_interleave(group, -3) for t in (k, v)
        )
        return (query @ key.mT * scale).masked_fill(~seen, float("-inf")), value

    def _rows(self, t, rows):  # [b, s, h, d] or [s, h, d]
        return t[rows] if t.ndim == 3 else t[:, rows]

    def _stats(self, lse, rows):  # [b, h, s] or [h, s]
        return lse[..., rows]


class Handle:
    def remove(self):
        pass


@pytest.fixture
def versions(monkeypatch):
    """FA3 and FA4 in torch's own registry, as packages would put them there; whatever they do."""
    active = torch_attention._registry
    monkeypatch.setitem(active._FLASH_ATTENTION_IMPLS, "FA3", Handle)
    monkeypatch.setitem(active._FLASH_ATTENTION_IMPLS, flash.FA4, Handle)
    yield active
    if torch_attention.current_flash_attention_impl() is not None:
        torch_attention.restore_flash_attention_impl()


@pytest.fixture
def operators(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(flash, "aten", stand_in)
    return stand_in


def without_bands(kernel, monkeypatch):
    monkeypatch.setattr(Flash, "bands", property(lambda self: self is not kernel))


def check(kernel, case, batch=2):
    tensors = make_tensors(case.num_queries, case.num_keys, batch=batch)
    expected = attention(*tensors, allowed(case))
    for got, want in zip(run(kernel, *tensors, case.mask), expected, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("name", ["flash", "fa3", "fa4"])
@pytest.mark.parametrize("label", CASES)
def test_tile_against_written_out_attention(operators, versions, monkeypatch, name, label):
    monkeypatch.setattr(Flash, "bands", True)
    check(KERNELS[name], CASES[label])
    assert {version for version, _ in operators.calls} == {KERNELS[name].version}


@pytest.mark.parametrize("label", [*SQUARES, "documents", "documents, anti-causal"])
def test_a_version_without_bands_is_not_asked_for_windows(
    operators, versions, monkeypatch, label
):
    operators.refuses_windows = True
    without_bands(KERNELS["fa4"], monkeypatch)
    check(KERNELS["fa4"], CASES[label])


@pytest.mark.parametrize("label", ["causal", "window", "documents"])
def test_tensors_reach_the_operator_where_they_lie(operators, label):
    case = CASES[label]
    q, k, v, dout = make_tensors(case.num_queries, case.num_keys, batch=1)
    run(KERNELS["flash"], q, k, v, dout, case.mask)
    assert len(operators.calls) == 2
    for _, received in operators.calls:
        for got, given in zip(received, (q, k, v), strict=True):
            assert got.data_ptr() == given.data_ptr()
            assert (got.stride(-3), got.stride(-2)) == (given.stride(2), given.stride(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_packed_rows_of_a_batch_go_one_by_one(operators, batch):
    check(KERNELS["flash"], PACKED["documents, window"], batch)
    assert len(operators.calls) == 2 * batch


def test_lengths_are_copied_to_a_device_once():
    first = flash._on_device((0, 3, 9), torch.device("cpu"))
    assert first.dtype == torch.int32 and first.tolist() == [0, 3, 9]
    assert flash._on_device((0, 3, 9), torch.device("cpu")) is first


def test_a_tile_that_was_not_trimmed_is_an_error():
    q, k, v, _ = make_tensors(8, 12)
    for mask in (TileMask(lo=0), TileMask(hi=-6)):  # keys 8 to 11, and queries' keys before 0
        with pytest.raises(ValueError, match="see or are seen by nothing"):
            KERNELS["flash"].forward(q, k, v, mask=mask, softmax_scale=1.0)


def test_the_right_version_is_active_before_each_call(operators, versions, monkeypatch):
    activated = []
    activate = flash.activate_flash_attention_impl
    monkeypatch.setattr(
        flash,
        "activate_flash_attention_impl",
        lambda version: (activated.append(version), activate(version)),
    )
    q, k, v, _ = make_tensors(6, 6)
    for name in ("flash", "fa4", "fa4", "flash", "fa3", "fa4"):
        KERNELS[name].forward(q, k, v, mask=CAUSAL, softmax_scale=1.0)
    used = [version for version, _ in operators.calls]
    assert used == [None, flash.FA4, flash.FA4, None, "FA3", flash.FA4]
    assert activated == [flash.FA4, "FA3", flash.FA4]  # not again where it is the active one
    assert torch_attention.current_flash_attention_impl() == flash.FA4


def test_keep_active(versions):
    torch_attention.activate_flash_attention_impl("FA3")
    with contextlib.suppress(KeyError), flash.keep_active():
        flash._activate(flash.FA4)
        raise KeyError
    assert torch_attention.current_flash_attention_impl() == "FA3"


# Trials: what is known of a version after a look at it. On CPU in fp32, with the stand-in.


@pytest.fixture
def trial(operators, versions):
    flash._trial.cache_clear()
    yield lambda kernel, what: flash._trial(kernel, what, "cpu", torch.float32, 16)
    flash._trial.cache_clear()


@pytest.mark.parametrize("what", ["squares", "bands", "packed"])
def test_trial_of_a_version_that_works(trial, operators, what):
    assert trial(KERNELS["fa4"], what) is None
    assert [version for version, _ in operators.calls] == [flash.FA4, flash.FA4]
    assert torch_attention.current_flash_attention_impl() is None  # as before
    assert trial(KERNELS["fa4"], what) is None
    assert len(operators.calls) == 2  # once


def test_trial_names_what_is_missing(trial, versions, monkeypatch):
    def register():
        raise ModuleNotFoundError("No module named 'flash_attn'")

    monkeypatch.setitem(versions._FLASH_ATTENTION_IMPLS, flash.FA4, register)
    expected = r"needs the package flash-attn-4 (No module named 'flash_attn')"
    assert trial(KERNELS["fa4"], "squares") == expected


def test_trial_of_a_package_that_does_not_fit_torch(trial, operators, monkeypatch):
    def forward(*args, **options):
        raise ValueError("too many values to unpack (expected 2)")

    monkeypatch.setattr(operators, "_flash_attention_forward", forward)
    said = trial(KERNELS["fa4"], "squares")
    assert "fails its trial on squares of head_dim 16 here" in said
    assert "(ValueError: too many values to unpack (expected 2))" in said
    assert f"another version of flash-attn-4 may fit torch {torch.__version__}" in said
    assert torch_attention.current_flash_attention_impl() is None


def test_trial_of_a_version_without_windows(trial, operators):
    operators.refuses_windows = True
    assert trial(KERNELS["fa4"], "squares") is None
    assert "windowed attention not supported)" in trial(KERNELS["fa4"], "bands")


@pytest.mark.parametrize("wrong", ["zero", "nan"])
def test_trial_looks_at_the_numbers(trial, operators, monkeypatch, wrong):
    backward = operators._flash_attention_backward

    def spoil(*args, **options):
        dq, dk, dv = backward(*args, **options)
        return dq, dk * (0 if wrong == "zero" else float("nan")), dv

    monkeypatch.setattr(operators, "_flash_attention_backward", spoil)
    assert "(dk is off by" in trial(KERNELS["fa3"], "squares")


def test_bands_and_packed_of_a_version_come_from_its_trials(monkeypatch):
    tried = []
    monkeypatch.setattr(
        flash, "_trial", lambda kernel, what, *rest: tried.append(what) or what == "bands" or None
    )
    assert not KERNELS["fa4"].bands and KERNELS["fa4"].packed
    assert KERNELS["flash"].bands and KERNELS["flash"].packed
    assert tried == ["bands", "packed"]  # torch's own needs none


def test_refusal_of_a_version_is_that_of_its_trial(monkeypatch):
    class OnCuda:
        device, dtype, shape = torch.device("cuda"), torch.bfloat16, (1, 4, 8, 96)

    tried = []
    monkeypatch.setattr(flash, "_trial", lambda *given: tried.append(given[1:]) or "is broken")
    assert KERNELS["fa4"].refuse(OnCuda(), OnCuda()) == "is broken"
    assert KERNELS["flash"].refuse(OnCuda(), OnCuda()) is None
    assert tried == [("squares", OnCuda.device, torch.bfloat16, 96)]


def test_anticausal_is_native_where_bands_are(operators):
    q, k, v, dout = make_tensors(9, 9, batch=1)
    run(KERNELS["flash"], q, k, v, dout, ANTICAUSAL)
    assert operators.calls[0][1][0].data_ptr() == q.data_ptr()  # not a reversed copy
