"""Presets give what was published, for what it was published, and say so otherwise."""

from dataclasses import replace

import pytest

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec
from tests.rope.specs import LLAMA2, LLAMA3, PUBLISHED, QWEN, SMALL, call


@pytest.mark.parametrize(("method", "base", "name", "length"), [
    ("prolong", LLAMA3, "ProLong 64K", 65536), ("prolong", LLAMA3, "ProLong 512K", 524288),
    ("easycontext", LLAMA2, "EasyContext 32K", 32768),
    ("easycontext", LLAMA2, "EasyContext 64K", 65536),
    ("easycontext", LLAMA2, "EasyContext 256K end", 256000),
    ("easycontext", LLAMA2, "EasyContext 512K end", 512000),
    ("easycontext", LLAMA2, "EasyContext 1M (config only)", 1048576),
    ("lwm", LLAMA2, "LWM 128K", 131072), ("lwm", LLAMA2, "LWM 256K", 262144),
    ("lwm", LLAMA2, "LWM 512K", 524288), ("lwm", LLAMA2, "LWM 1M", 1048576),
    ("qwen2.5-1m", QWEN, "Qwen2.5-1M train 256K", 262144)])
def test_presets_are_what_was_published(method, base, name, length):
    row = next(row for row in PUBLISHED["coverage"] if row["name"] == name)
    assert row["L"] == length
    spec = call(method, base, length)
    assert spec == RopeSpec(rope_theta=row["base"], rotary_dim=128, original_len=length)
    assert call(method, base, base.original_len) == base


def test_presets_go_on_from_a_stage_of_their_own():
    half = call("prolong", LLAMA3, 65536)
    assert call("prolong", half, 524288) == call("prolong", LLAMA3, 524288)
    with pytest.raises(RecipeError, match="target length 32768 is below"):
        call("prolong", half, 32768)


@pytest.mark.parametrize(("method", "base", "length", "error", "message"), [
    ("prolong", LLAMA3, 131072, RecipeError, "prolong was not published for target length 131072 "
     "from native length 8192; its lengths (and thetas) are 65536 (8000000), 524288 (128000000); "
     "choose one of them, or method critical or ntk"),
    ("easycontext", LLAMA2, 262144, RecipeError, "256000 (50000000)"),
    ("qwen2.5-1m", QWEN, 1048576, RecipeError, "It reads 1M tokens by dual chunk attention"),
    ("prolong", LLAMA2, 65536, CompatibilityError, "prolong was published for models of theta "
     "500000, native length 8192 and 128 rotated channels, but this one has 10000, 4096 and 128"),
    ("lwm", SMALL, 131072, CompatibilityError, "but this one has 100000, 8192 and 64"),
    ("prolong", replace(LLAMA3, rotary_dim=64), 65536, CompatibilityError, "8192 and 64"),
])
def test_presets_name_what_was_published(method, base, length, error, message):
    with pytest.raises(error) as caught:
        call(method, base, length)
    assert message in str(caught.value)
