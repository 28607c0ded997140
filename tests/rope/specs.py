"""Published bases, and how the tests call the methods."""

import json
from pathlib import Path

from extend.model_config import RopeSpec
from extend.rope import METHODS
from extend.rope.methods import apply_method
from extend.rope.presets import PRESETS

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
LLAMA3 = RopeSpec(rope_theta=500_000.0, rotary_dim=128, original_len=8192)
LLAMA2 = RopeSpec(rope_theta=10_000.0, rotary_dim=128, original_len=4096)
QWEN = RopeSpec(rope_theta=1e6, rotary_dim=128, original_len=32768)
SMALL = RopeSpec(rope_theta=100_000.0, rotary_dim=64, original_len=8192)
TINY = RopeSpec(rope_theta=10_000.0, rotary_dim=16, original_len=256)
BASES = [LLAMA3, LLAMA2, SMALL, TINY]

WRITTEN = [m for m in METHODS if m != "dynamic"]  # which is only read
ANY_BASE = [m for m in WRITTEN if m not in PRESETS]
NEW_THETA = ["theta", "ntk", "critical", "gradient-v1", "gradient-v2"]
STILL = "proportional"  # leaves pairs that stand still


def options_for(method: str, spec: RopeSpec, factor: float = 16.0) -> dict:
    """The options that a method cannot do without; with `factor` 1, those that change nothing."""
    pairs = spec.rotary_dim // 2
    growing = [1 + (factor - 1) * i / (pairs - 1) for i in range(pairs)]
    return {"theta": {"rope_theta": spec.rope_theta if factor == 1 else 20 * spec.rope_theta},
            "longrope": {"long_factor": growing},
            "proportional": {"partial_rotary_factor": 1.0 if factor == 1 else 0.5},
            }.get(method, {})


def call(method: str, spec: RopeSpec, target_len: int, **options) -> RopeSpec:
    factor = target_len / spec.original_len
    return apply_method(method, spec, target_len,
                        {**options_for(method, spec, factor), **options})
