"""Thetas of staged trainings against published ones and against one step, and what is warned of."""

import json
from pathlib import Path

import pytest
from torch.testing import assert_close

from extend.model_config import RopeSpec
from extend.rope.frequencies import inv_freq
from extend.rope.schedule import Stage, composition_warnings, schedule_ropes, stepwise_ropes

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
LLAMA3 = RopeSpec(rope_theta=500_000.0, rotary_dim=128, original_len=8192)
LENGTHS = (65536, 262144, 524288)
COMPOSING = {"linear", "ntk", "critical", "ntk-by-parts", "yarn", "gradient-v2"}


def stages(method: str = "critical", lengths=LENGTHS, **options) -> list[Stage]:
    return [Stage(length, method, options) for length in lengths]


def test_the_default_is_the_critical_formula():
    rows = {row["T"]: row["critical"] for row in PUBLISHED["llama3_8k_theta"]}
    lengths = sorted(rows)
    ropes = schedule_ropes(LLAMA3, [Stage(length) for length in lengths])
    # Powers of fp64 numbers: a few units in the last place.
    assert [rope.rope_theta for rope in ropes] == pytest.approx(
        [rows[length] for length in lengths], rel=1e-12)


def test_a_stage_without_a_rope_keeps_the_last_one():
    ropes = schedule_ropes(LLAMA3, [None, Stage(65536), None, Stage(262144)])
    assert ropes[0] == LLAMA3
    assert ropes[1] == ropes[2] == Stage(65536).apply(LLAMA3)
    assert ropes[3] == Stage(262144).apply(LLAMA3)


def test_steps_of_gradient_v1_are_the_published_thetas():
    in_steps = stepwise_ropes(LLAMA3, stages("gradient-v1"))
    assert [rope.rope_theta for rope in in_steps] == [15296098, 207112184, 1062356830]


def test_scaled_ropes_always_count_from_the_native_length():
    """What cannot be put on top of the stage before: it is scaled, or made for more tokens."""
    for given in (stages("yarn"), [Stage(262144), Stage(65536, "ntk")]):
        assert stepwise_ropes(LLAMA3, given)[1] == given[1].apply(LLAMA3)


@pytest.mark.parametrize("method", sorted(COMPOSING))
def test_methods_that_compose(method):
    given = stages(method)
    at_once, in_steps = schedule_ropes(LLAMA3, given), stepwise_ropes(LLAMA3, given)
    rtol = 1e-7 if method == "gradient-v2" else 1e-12  # its thetas are cut to whole numbers
    for one, other in zip(at_once, in_steps):
        assert_close(inv_freq(other), inv_freq(one), rtol=rtol, atol=0)
    assert composition_warnings(LLAMA3, given) == []


@pytest.mark.parametrize("native_len", [64, 2048, 4096])
def test_rounding_a_small_theta_is_no_reason_to_warn(native_len):
    """gradient-v2 rounds thetas near 1e4, and a step from a rounded one ends 1 or 2 beside it."""
    native = RopeSpec(rope_theta=10_000.0, rotary_dim=128, original_len=native_len)
    given = stages("gradient-v2", [native_len * 9 // 8, native_len * 5 // 4, native_len * 16])
    at_once, in_steps = schedule_ropes(native, given), stepwise_ropes(native, given)
    assert [rope.rope_theta for rope in at_once] != [rope.rope_theta for rope in in_steps]
    assert composition_warnings(native, given) == []


def test_warns_of_a_method_that_does_not_compose():
    warnings = composition_warnings(LLAMA3, stages("gradient-v1"))
    assert len(warnings) == 2
    for text in ("262144 tokens (gradient-v1)", "native 8192", "theta 67478326",
                 "65536, 262144", "theta 207112184"):
        assert text in warnings[0]
    for text in ("theta 138113234", "65536, 262144, 524288", "theta 1062356830"):
        assert text in warnings[1]


def test_warns_of_a_theta_that_falls():
    given = [Stage(65536, "theta", {"rope_theta": 8e6}),
             Stage(262144, "theta", {"rope_theta": 4e6})]
    (warning,) = composition_warnings(LLAMA3, given)
    for text in ("from 65536 to 262144", "63 of 64 pairs turn faster", "theta 8000000",
                 "theta 4000000"):
        assert text in warning


def test_warns_of_stages_that_count_from_different_originals():
    """YaRN counts from the native theta, and a third of the pairs jump back to it."""
    different, faster = composition_warnings(LLAMA3, [Stage(65536), None, Stage(262144, "yarn")])
    assert "theta 500000 (yarn)" in different
    assert "theta 22443169.37 (yarn)" in different
    expected = int((inv_freq(Stage(262144, "yarn").apply(LLAMA3))
                    > inv_freq(Stage(65536).apply(LLAMA3)) * 1.000001).sum())
    assert f"{expected} of 64 pairs turn faster" in faster


def test_one_stage_needs_no_composition():
    assert composition_warnings(LLAMA3, [None, *stages("gradient-v1", [65536]), None]) == []
