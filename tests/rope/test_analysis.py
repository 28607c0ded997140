"""Per-pair numbers against tables, integrals done point by point, and transformers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from extend.model_config import RopeSpec
from extend.rope.analysis import NATIVE, NEVER, TARGET, analyse, base_horizon, pair_movement
from extend.rope.frequencies import inv_freq
from extend.rope.methods import apply_method

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
LLAMA3 = RopeSpec(rope_theta=500_000.0, rotary_dim=128, original_len=8192)
SMOLLM2 = RopeSpec(rope_theta=100_000.0, rotary_dim=64, original_len=8192)
TINY = RopeSpec(rope_theta=10_000.0, rotary_dim=32, original_len=256)
PI = math.pi

# theta (head size 128) -> first distance with a negative sum of cosines, scanned one by one
HORIZONS = {
    1e4: 1707, 5e5: 18438, 1e6: 27115, 8e6: 61936, 1e7: 144660, 15296098: 138114, 2.5e7: 137077,
    5e7: 416715, 1.28e8: 605269, 207112184: 754858, 283461213: 896530, 1062356830: 1867108,
    2804339835: 2098782, 3580165449: 1795662, 4134231: 56262, 16904847: 194367, 69123823: 517574,
    22443169: 130366}


def after(method: str, native: RopeSpec, target_len: int, **options):
    return analyse(apply_method(method, native, target_len, options), native, target_len)


@pytest.mark.parametrize("theta", HORIZONS)
def test_base_horizon(theta):
    spec = replace(LLAMA3, rope_theta=float(theta))
    assert base_horizon(inv_freq(spec), 2 ** 22) == HORIZONS[theta]


def test_base_horizon_ends_at_the_limit():
    frequencies = inv_freq(replace(LLAMA3, rope_theta=1e4))
    assert base_horizon(frequencies, 1707) is None
    assert base_horizon(frequencies, 1708) == 1707
    assert base_horizon(torch.zeros(4, dtype=torch.float64), 10_000) is None


def test_base_horizon_equals_a_sum_for_each_distance():
    frequencies = inv_freq(SMOLLM2)
    sums = (torch.arange(12_000, dtype=torch.float64)[:, None] * frequencies).cos().sum(dim=1)
    assert base_horizon(frequencies, 12_000) == int((sums < 0).nonzero()[0])


def test_pairs_that_complete_a_turn_in_published_models():
    for row in PUBLISHED["coverage"]:
        spec = RopeSpec(rope_theta=row["base"], rotary_dim=128, original_len=row["L"])
        found = analyse(spec, spec, row["L"])
        assert found.full_pairs == row["pairs_full_period"], row["name"]
        assert float(found.wavelength[-1]) == pytest.approx(row["longest_wavelength"], rel=1e-12)


def test_what_does_not_change_has_not_moved():
    found = analyse(LLAMA3, LLAMA3, LLAMA3.original_len)
    ones, zeros = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    assert_close(found.slowdown, ones, rtol=0, atol=0)
    assert_close(found.reach, ones, rtol=0, atol=0)
    assert_close(found.movement, zeros, rtol=0, atol=0)
    assert_close(found.phase_shift, zeros, rtol=0, atol=0)
    assert (found.mean_movement, found.unseen_pairs) == (0, 0)


def test_llama3_slows_pairs_as_published():
    found = after("ntk-by-parts", LLAMA3, 65536)
    expected = torch.ones(64, dtype=torch.float64)
    for i, ratio in PUBLISHED["llama3_rope_x8"]["ratio"].items():
        expected[int(i)] = ratio
    expected[35:] = 8.0
    assert_close(found.slowdown, expected, rtol=1e-9, atol=0)  # the table has ten digits


def test_states_reach_and_counts():
    """Native: 35 pairs turn in 8192 tokens. Plain theta lets more of them turn in 131072."""
    same = analyse(LLAMA3, LLAMA3, 131072)
    assert same.states == [NATIVE] * 35 + [TARGET] * (same.full_pairs - 35) + \
        [NEVER] * (64 - same.full_pairs)
    assert same.full_pairs == 49  # ceil of 32 * log(131072 / 2 pi) / log(500000) * 2 = 48.5
    assert same.unseen_pairs == 29
    linear = after("linear", LLAMA3, 131072)
    assert_close(linear.reach, torch.ones(64, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (linear.full_pairs, linear.unseen_pairs) == (35, 0)
    critical = after("critical", LLAMA3, 131072)
    assert (critical.full_pairs, critical.unseen_pairs) == (35, 0)
    ntk = after("ntk", LLAMA3, 131072)
    assert float(ntk.reach[-1]) == pytest.approx(1, rel=1e-12)
    assert ntk.unseen_pairs == 28  # all beyond the critical index but the last


def test_a_pair_that_stands_still():
    """Proportional RoPE: no turn, no wavelength; nothing lost where it stood still before."""
    plain = RopeSpec(rope_theta=1e4, rotary_dim=4, original_len=64)
    still = replace(plain, scaling={"rope_type": "proportional", "partial_rotary_factor": 0.5})
    same, stopped = analyse(still, still, 64), analyse(still, plain, 64)
    assert same.wavelength.tolist() == stopped.wavelength.tolist() == [2 * PI, math.inf]
    assert same.slowdown.tolist() == [1, 1]
    assert stopped.slowdown.tolist() == [1, math.inf]
    assert same.movement.tolist() == [0, 0]
    assert float(stopped.movement[1]) > 0
    assert same.states == [NATIVE, NEVER]


@pytest.mark.parametrize("native", [LLAMA3, SMOLLM2, TINY], ids=["llama3", "smollm2", "tiny"])
@pytest.mark.parametrize("method", ["linear", "ntk", "critical", "ntk-by-parts", "yarn"])
def test_movement_is_the_mean_over_log_spaced_distances(native, method):
    length = native.original_len
    found = after(method, native, 16 * length)
    edges = torch.linspace(0, math.log(length), 2_000_001, dtype=torch.float64)
    distances = ((edges[1:] + edges[:-1]) / 2).exp()
    shift = inv_freq(native) - inv_freq(found.rope)
    expected = torch.stack([(1 - (distances * s).cos()).mean() for s in shift[::4]])
    # The fastest angle advances by 0.04 rad between two of these points: midpoint error 1e-5.
    assert_close(found.movement[::4], expected, rtol=0, atol=1e-5)
    assert_close(found.phase_shift, length * shift / (2 * PI), rtol=1e-12, atol=1e-12)


def test_movement_orders_rescalings_as_a_siblings_skill_fell():
    """Trials without training. SmolLM2: by-parts and YaRN kept the skill, theta 4e5 kept 0.975,
    1e6 0.65, 1.75e6 0.2, 1.6e7 none. Tiny: by-parts kept it; theta 4e4 left 0.2, YaRN none."""
    smollm2 = [after("ntk-by-parts", SMOLLM2, 131072), after("yarn", SMOLLM2, 131072)]
    smollm2 += [after("theta", SMOLLM2, 131072, rope_theta=t) for t in (4e5, 1e6, 1.75e6, 1.6e7)]
    tiny = [after("ntk-by-parts", TINY, 1024), after("ntk-by-parts", TINY, 2048),
            after("theta", TINY, 2048, rope_theta=4e4), after("yarn", TINY, 2048)]
    for trials in (smollm2, tiny):
        moved = [trial.mean_movement for trial in trials]
        assert moved == sorted(moved)


def test_a_list_of_its_own_for_short_rows_moves_nothing():
    """longrope with two lists: rows of the native length are read as before."""
    ones, twos = [1.0] * 16, [2.0] * 16
    found = after("longrope", TINY, 1024, long_factor=twos, short_factor=ones)
    assert_close(found.slowdown, torch.full((16,), 2.0, dtype=torch.float64), rtol=0, atol=0)
    assert_close(found.movement, torch.zeros(16, dtype=torch.float64), rtol=0, atol=0)
    assert_close(found.phase_shift, torch.zeros(16, dtype=torch.float64), rtol=0, atol=0)
    one_list = after("longrope", TINY, 1024, long_factor=twos)
    assert float(one_list.movement.min()) > 1e-6


def test_a_slow_pair_may_be_slowed_but_not_a_fast_one():
    before = torch.tensor([1.0, 2 * PI * 0.01 / 8192], dtype=torch.float64)  # 1304 turns, 0.01
    moved = pair_movement(before, before / 16, 8192)
    assert float(moved[0]) > 0.9
    assert float(moved[1]) < 1e-3


@pytest.mark.parametrize("spec", [
    LLAMA3, replace(LLAMA3, rope_theta=3580165449.0),
    replace(LLAMA3, scaling={"rope_type": "linear", "factor": 3.0}),
    replace(LLAMA3, scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    replace(LLAMA3, scaling={"rope_type": "yarn", "factor": 16.0,
                             "original_max_position_embeddings": 8192})],
    ids=["plain", "large theta", "linear", "llama3", "yarn"])
def test_angle_error_is_that_of_transformers(spec):
    length = 131072
    rotary = LlamaRotaryEmbedding(LlamaConfig(
        head_dim=128, max_position_embeddings=length,
        rope_parameters={"rope_type": "default", **spec.scaling, "rope_theta": spec.rope_theta}))
    positions = torch.arange(length - 4096, length)[:, None]
    angles = positions.float() * rotary.inv_freq
    expected = (angles.double() - positions.double() * inv_freq(spec)).abs().amax(dim=0)
    found = analyse(spec, LLAMA3, length).angle_error
    # Only what llama3 and yarn blend is rounded in another order, by a few times 6e-8 of the angle.
    ratio = inv_freq(LLAMA3) / inv_freq(spec)
    factor = spec.scaling.get("factor", 1.0)
    blended = (ratio > 1 + 1e-12) & (ratio < factor - 1e-12) & bool(spec.scaling)
    assert_close(found[~blended], expected[~blended], rtol=0, atol=0)
    assert int((~blended).sum()) > 40
    assert float(found.max()) == pytest.approx(float(expected.max()), rel=0.01)


@pytest.mark.parametrize(("length", "low", "high"), [
    (8192, 4e-4, 6e-4), (131072, 0.0066, 0.0095), (262144, 0.013, 0.020), (1048576, 0.049, 0.076)])
def test_angle_error_grows_with_the_length(length, low, high):
    """Bounds measured with numpy for theta 5e5, its NTK, critical and YaRN variants."""
    for method in ("critical", "yarn"):
        assert low <= float(after(method, LLAMA3, length).angle_error.max()) <= high
