"""Warnings of a merge: what trials say against it."""

import logging

import pytest

from extend.adapter_format.sidecar import RopeChange
from extend.merge import advice, merge
from extend.merge.advice import advise, moves_fast_pairs
from extend.model_config import RopeSpec
from extend.rope.methods import apply_method

NATIVE = RopeSpec(rope_theta=1e5, rotary_dim=64, original_len=8192, scaling={})


def change(method: str, **options) -> RopeChange:
    after = apply_method(method, NATIVE, 131072, options)
    return RopeChange(before=NATIVE.to_json(), after=after.to_json(),
                      max_position_embeddings_before=8192, max_position_embeddings_after=131072,
                      config_keys={})


@pytest.mark.parametrize(("method", "options", "moved"), [
    ("ntk", {}, True), ("critical", {}, True), ("theta", {"rope_theta": 1.6e7}, True),
    ("linear", {}, True), ("yarn", {}, False),
    ("ntk-by-parts", {"low_freq_factor": 1, "high_freq_factor": 32}, False),
    ("ntk-by-parts", {"low_freq_factor": 1, "high_freq_factor": 64}, True)])
def test_which_methods_move_fast_pairs(method, options, moved):
    assert moves_fast_pairs(change(method, **options)) == moved


def test_what_is_warned_of():
    safe, unsafe = change("yarn"), change("ntk")
    assert advise(unsafe, "add", (1.0,)) == []
    assert advise(safe, "orthogonal", (0.5,)) == []
    assert advise(None, "orthogonal", (0.5,)) == []
    orthogonal, = advise(unsafe, "orthogonal", (1.0,))
    assert "orthogonal leaves out just that part" in orthogonal
    light, = advise(unsafe, "add", (1.0, 0.5))
    assert "a weight below 1 gives back less" in light
    assert len(advise(unsafe, "orthogonal", (0.5,))) == 2


@pytest.mark.parametrize(("fast_turns", "warned"), [(32, 0), (4, 1)])
def test_a_merge_warns_once_and_goes_on(case, tmp_path, caplog, monkeypatch, fast_turns, warned):
    """Theta goes from 1e4 to 2.5e5 on 128 tokens: pairs turn 20.4 times (not moved), 6.4, ..."""
    monkeypatch.setattr(advice, "FAST_TURNS", fast_turns)
    with caplog.at_level(logging.WARNING):
        out = merge(case.adapter, case.models.target, tmp_path / "out", weight=0.5)
    assert sum("weight below 1" in record.getMessage() for record in caplog.records) == warned
    assert (out / "manifest.json").is_file()
