"""Candidates are what `extend rescale` would write."""

import numpy as np
import torch

from extend.model_config import RopeSpec
from extend.rope.frequencies import attention_factor, inv_freq
from extend.rope.methods import METHODS, apply_method
from extend.search.candidates import (
    Candidate,
    analytic_candidates,
    curve_candidate,
    features,
    native_candidate,
    theta_candidate,
)
from extend.search.curve import Curve

SPEC = RopeSpec(rope_theta=1e5, rotary_dim=64, original_len=8192)


def test_every_method_without_a_required_option_is_there():
    found, refused = analytic_candidates(SPEC, 32768)
    told = {name.split()[0] for c in found for name in (c.name, *c.aliases)}
    told |= {name.split()[0] for name in refused}
    assert told >= set(METHODS) - {"theta", "longrope"}
    assert {"ntk", "critical", "linear", "yarn", "ntk-by-parts"} <= {
        c.name.split()[0] for c in found}


def test_no_two_analytic_candidates_turn_alike():
    found, _ = analytic_candidates(SPEC, 65536)
    for i, first in enumerate(found):
        for second in found[:i]:
            gap = (inv_freq(first.rope) / inv_freq(second.rope).clamp(min=1e-30)).log().abs().max()
            assert gap > 1e-4 or attention_factor(first.rope) != attention_factor(second.rope)
    names = {alias for c in found for alias in c.aliases}
    assert "gradient-v2" in names  # critical in whole numbers


def test_method_and_options_give_the_rope_again():
    candidates, _ = analytic_candidates(SPEC, 32768)
    candidates += [theta_candidate(SPEC, 32768, 123456.789),
                   curve_candidate(SPEC, 32768, Curve(start=9, end=20, factor=5.0, bend=0.7,
                                                      attention_factor=1.05))]
    for candidate in candidates:
        again = apply_method(candidate.method, SPEC, 32768, dict(candidate.options))
        assert again == candidate.rope


def test_the_key_names_frequencies_and_attention_not_the_method():
    ntk = apply_method("ntk", SPEC, 32768, {})
    assert Candidate("a", "native", ntk, None, {}).key == Candidate("b", "theta", ntk, "x", {}).key
    assert native_candidate(SPEC).key != native_candidate(ntk).key
    plain, cooled = (curve_candidate(SPEC, 32768, Curve(start=9, end=20, factor=5.0, bend=1,
                                                        attention_factor=a)) for a in (1.0, 1.1))
    assert plain.key != cooled.key
    torch.testing.assert_close(inv_freq(plain.rope), inv_freq(cooled.rope), rtol=0, atol=0)


def test_features_are_logarithms_of_factors():
    curve = Curve(start=9, end=20, factor=5.0, bend=1, attention_factor=1.1)
    found = features(SPEC, curve_candidate(SPEC, 32768, curve).rope)
    expected = np.append(np.log(curve.factors(32)), 10 * np.log(1.1))
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(features(SPEC, SPEC), 0.0, atol=1e-12)
