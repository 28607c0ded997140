"""Every method side by side, against published numbers; schedules; what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec
from extend.plan.report import methods_table, pairs_table, schedule_table, to_json
from extend.plan.rope import plan_rope
from extend.rope import METHODS
from extend.rope.frequencies import inv_freq
from extend.rope.methods import apply_method

PUBLISHED = json.loads((Path(__file__).parents[1] / "rope" / "published.json").read_text())
LLAMA3 = RopeSpec(rope_theta=500_000.0, rotary_dim=128, original_len=8192)
TINY = RopeSpec(rope_theta=10_000.0, rotary_dim=8, original_len=64)


@pytest.mark.parametrize("row", PUBLISHED["llama3_8k_theta"][::3], ids=lambda r: str(r["T"]))
def test_thetas_are_the_published_ones(row):
    rope = to_json(plan_rope(LLAMA3, row["T"]))
    methods = rope["methods"]
    assert methods["ntk"]["theta"] == pytest.approx(row["ntk"], rel=1e-12)
    assert methods["critical"]["theta"] == pytest.approx(row["critical"], rel=1e-12)
    assert methods["gradient-v1"]["theta"] == int(row["dyn_f4_oneshot"])
    assert rope["critical_index"] == pytest.approx(PUBLISHED["crit_dim"]["llama3_8k"][0],
                                                   rel=1e-12)


def test_inv_freq_and_attention_factor_of_every_method():
    rope = to_json(plan_rope(LLAMA3, 131072))
    for name, found in rope["methods"].items():
        expected = inv_freq(apply_method(name, LLAMA3, 131072, {}))
        assert_close(torch.tensor(found["inv_freq"], dtype=torch.float64), expected, rtol=0, atol=0)
    yarn = rope["methods"]["yarn"]
    published = PUBLISHED["yarn"]["llama3_8k_x16"]
    assert yarn["attention_factor"] == pytest.approx(published["mscale"], rel=1e-12)
    for i, value in published["inv_freq"].items():
        assert yarn["inv_freq"][int(i)] == pytest.approx(value, rel=1e-12)
    assert rope["methods"]["linear"]["attention_factor"] == 1


def test_every_method_is_there_or_refused_with_a_reason():
    found = plan_rope(LLAMA3, 131072)
    assert {*found.methods, *found.refused} == set(METHODS)
    assert not {*found.methods} & {*found.refused}
    assert "missing option rope_theta" in found.refused["theta"]
    assert "missing option long_factor" in found.refused["longrope"]
    table = methods_table(found)
    for name in METHODS:
        assert f"\n{name} " in table or f"\n  {name}: " in table


def test_options_belong_to_the_chosen_method():
    found = plan_rope(LLAMA3, 131072, method="theta", options={"rope_theta": 8e6})
    assert found.methods["theta"].rope.rope_theta == 8e6
    with pytest.raises(RecipeError, match="rope_theta must be a finite number above 1, not 0"):
        plan_rope(LLAMA3, 131072, method="theta", options={"rope_theta": 0})
    with pytest.raises(RecipeError, match="unknown option 'rope_thta'; did you mean"):
        plan_rope(LLAMA3, 131072, method="theta", options={"rope_thta": 1e6})
    with pytest.raises(RecipeError, match="unknown 'nkt'; did you mean 'ntk'"):
        plan_rope(LLAMA3, 131072, method="nkt")


def test_one_error_for_a_target_below_the_native_length():
    with pytest.raises(RecipeError, match=r"length 4096 is below the model's native length 8192"):
        plan_rope(LLAMA3, 4096)


def test_one_error_for_a_rope_that_is_scaled_already():
    with pytest.raises(CompatibilityError, match=r"yarn.* 8192"):
        plan_rope(apply_method("yarn", LLAMA3, 65536, {}), 131072)


def test_a_target_that_is_the_native_length_changes_nothing():
    found = plan_rope(LLAMA3, 8192)
    for name, analysis in found.methods.items():
        if name in {"linear", "ntk", "critical", "ntk-by-parts", "yarn"}:
            assert_close(analysis.inv_freq, inv_freq(LLAMA3), rtol=0, atol=0)


def test_schedule():
    found = plan_rope(LLAMA3, 1048576, schedule=[65536, 262144, 1048576])
    rows = {row["T"]: row["critical"] for row in PUBLISHED["llama3_8k_theta"]}
    schedule = to_json(found)["schedule"]
    assert schedule["method"] == "critical"
    assert schedule["warnings"] == []
    for stage in schedule["stages"]:
        expected = pytest.approx(rows[stage["length"]], rel=1e-12)
        assert stage["theta"] == expected
        assert stage["theta_in_steps"] == expected
    assert "283,461,213" in schedule_table(found)
    assert "in steps" not in schedule_table(found)


def test_schedule_that_does_not_compose_shows_both_thetas():
    found = plan_rope(LLAMA3, 524288, method="gradient-v1", schedule=[65536, 262144, 524288])
    stages = to_json(found)["schedule"]["stages"]
    assert [stage["theta_in_steps"] for stage in stages] == [15296098, 207112184, 1062356830]
    assert [stage["theta"] for stage in stages] == [15296098, 67478326, 138113234]
    for text in ("207,112,184", "67,478,326", "does not compose"):
        assert text in schedule_table(found)


@pytest.mark.parametrize(("schedule", "match"), [
    ([65536, 32768], "lengths must not shrink, but 32768 follows 65536"),
    ([4096, 65536], "length 4096 is below the model's native length 8192")])
def test_bad_schedules(schedule, match):
    with pytest.raises(RecipeError, match=match):
        plan_rope(LLAMA3, 65536, schedule=schedule)


def test_json_holds_only_json():
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    still = {"partial_rotary_factor": 0.5}
    found = plan_rope(TINY, 256, method="proportional", options=still, schedule=[256])
    text = json.dumps(to_json(found))
    read = json.loads(text, parse_constant=refuse)
    pairs = read["methods"]["proportional"]["pairs"]
    assert pairs["wavelength"][2:] == pairs["slowdown"][2:] == [None, None]
    assert read["methods"]["proportional"]["horizon"] is None  # two pairs always agree


def test_pairs_table_has_a_line_for_each_pair():
    found = plan_rope(TINY, 256, method="ntk-by-parts")
    lines = pairs_table(found).splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "2", "3"]
    # theta 1e4, 4 pairs: wavelengths 2 pi, 20 pi, 200 pi, 2000 pi; 64 tokens hold 10.2, 1.02,
    # 0.1, 0.01 turns; all but the first are slowed, the last two by the whole factor.
    assert lines[3].split()[:4] == ["0", "6.283", "6.283", "1"]
    assert lines[6].split()[:4] == ["3", f"{2000 * math.pi:,.0f}", f"{8000 * math.pi:,.0f}", "4"]
    assert lines[6].split()[6] == "never"
    refused = plan_rope(TINY, 256, method="theta")
    assert pairs_table(refused).startswith("theta cannot be applied: ")
