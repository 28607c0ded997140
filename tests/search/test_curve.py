"""Curves never fall, hold the analytic methods, and stay inside what is searched."""

import itertools
import math

import pytest
import torch

from extend.model_config import RopeSpec
from extend.rope.frequencies import inv_freq
from extend.rope.methods import apply_method
from extend.search.candidates import curve_candidate
from extend.search.curve import DIMENSIONS, Curve, CurveSpace, halton

SPEC = RopeSpec(rope_theta=1e5, rotary_dim=64, original_len=8192)


def test_factors_never_fall_and_never_shrink():
    for pairs, extension in ((4, 1.5), (16, 8.0), (64, 128.0)):
        space = CurveSpace(pairs, extension)
        for point in halton(300, DIMENSIONS):
            factors = space.from_unit(point).factors(pairs)
            assert len(factors) == pairs and factors[0] >= 1
            assert all(a <= b for a, b in itertools.pairwise(factors))
            assert factors[-1] <= 4 * extension * (1 + 1e-6)


def test_points_outside_the_cube_are_taken_to_its_faces():
    space = CurveSpace(16, 8.0)
    assert space.from_unit([-3, 7, 2, -1, 9]) == space.from_unit([0, 1, 1, 0, 1])


@pytest.mark.parametrize("extension", [2.0, 16.0])
def test_a_straight_rise_over_all_pairs_is_ntk(extension: float):
    target_len = int(SPEC.original_len * extension)
    curve = Curve(start=0, end=31, factor=extension, bend=1)
    found = inv_freq(curve_candidate(SPEC, target_len, curve).rope)
    expected = inv_freq(apply_method("ntk", SPEC, target_len, {}))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # factors have seven digits


def test_a_step_at_the_first_pair_is_linear():
    curve = Curve(start=-1, end=-1, factor=4.0, bend=1)
    found = inv_freq(curve_candidate(SPEC, 32768, curve).rope)
    torch.testing.assert_close(found, inv_freq(apply_method("linear", SPEC, 32768, {})))


def test_bend_moves_the_middle_and_not_the_ends():
    early, late = (Curve(start=4, end=12, factor=16.0, bend=bend).factors(16)
                   for bend in (0.5, 2.0))
    assert early[:5] == late[:5] == [1.0] * 5 and early[12:] == late[12:] == [16.0] * 4
    assert early[8] == pytest.approx(16 ** (0.5 ** 0.5)) and late[8] == pytest.approx(16 ** 0.25)


def test_the_attention_factor_reaches_half_as_far_again_as_yarn():
    highest = CurveSpace(16, 8.0).from_unit([0, 0, 0, 0, 1]).attention_factor
    assert highest - 1 == pytest.approx(1.5 * 0.1 * math.log(8), abs=1e-4)
    assert CurveSpace(16, 8.0).from_unit([0] * 5).attention_factor == 1


def test_halton_points_are_the_radical_inverses():
    expected = [[1 / 2, 1 / 3], [1 / 4, 2 / 3], [3 / 4, 1 / 9], [1 / 8, 4 / 9]]
    torch.testing.assert_close(torch.tensor(halton(4, 2), dtype=torch.float64),
                               torch.tensor(expected, dtype=torch.float64))
    assert halton(6, 3)[2:] == halton(4, 3, skip=2)
