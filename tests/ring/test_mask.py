import re

import pytest
import torch

from extend.errors import CompatibilityError
from extend.ring.mask import Mask, make_mask


def test_a_mask_is_the_same_from_a_tensor_a_list_and_a_tuple():
    expected = Mask(causal=True, window=2, cu_seqlens=(0, 3, 4, 9))
    for bounds in (torch.tensor([0, 3, 4, 9], dtype=torch.int32), [0, 3, 4, 9], (0, 3, 4, 9)):
        mask = make_mask(True, 2, bounds, 9)
        assert mask == expected and hash(mask) == hash(expected)
        assert all(type(bound) is int for bound in mask.cu_seqlens)


@pytest.mark.parametrize(
    ("window", "bounds", "expected"),
    [
        (None, None, Mask()),
        (9, None, Mask()),  # a window over everything
        (8, None, Mask(window=8)),
        (None, (0, 9), Mask()),  # one document
        (5, (0, 4, 9), Mask(cu_seqlens=(0, 4, 9))),  # no document is longer than the window
        (4, (0, 4, 9), Mask(window=4, cu_seqlens=(0, 4, 9))),
        (1, (0, 4, 9), Mask(window=1, cu_seqlens=(0, 4, 9))),
    ],
)
def test_what_makes_no_difference_is_left_out(window, bounds, expected):
    assert make_mask(True, window, bounds, 9) == expected


def test_a_mask_may_see_everything():
    assert make_mask(False, None, None, 9) == Mask(causal=False)
    assert make_mask(False, None, (0, 4, 9), 9) == Mask(causal=False, cu_seqlens=(0, 4, 9))


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, -4), (False, 4)])
def test_a_window_must_look_back_over_at_least_one_token(causal, window):
    with pytest.raises(CompatibilityError, match=f"window={window} with causal={causal}"):
        make_mask(causal, window, None, 9)


@pytest.mark.parametrize(
    ("bounds", "shown"),
    [
        ((), "cu_seqlens (), 0 boundaries ending at nothing"),
        ((0,), "1 boundaries ending at 0"),
        ((1, 9), "cu_seqlens (1, 9)"),
        ((0, 8), "ending at 8, for a sequence of 9"),
        ((0, 4, 4, 9), "cu_seqlens (0, 4, 4, 9)"),
        ((0, 5, 3, 9), "cu_seqlens (0, 5, 3, 9)"),
        ((0, 1, 2, 3, 10), "cu_seqlens (0, 1, 2, 3, ...), 5 boundaries ending at 10"),
    ],
)
def test_boundaries_must_rise_from_0_to_the_length(bounds, shown):
    with pytest.raises(CompatibilityError, match=re.escape(shown)):
        make_mask(True, None, bounds, 9)


@pytest.mark.parametrize("bounds", [torch.tensor([[0, 9]]), torch.tensor([0.0, 9.0])])
def test_boundaries_of_another_kind_are_refused(bounds):
    with pytest.raises(CompatibilityError, match=r"cu_seqlens has shape .* whole numbers"):
        make_mask(True, None, bounds, 9)
