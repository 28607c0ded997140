"""Measurements against transformers' own forward with all logits."""

import logging
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from extend.model_config import read_config, write_rope
from extend.rope.live import set_rope
from extend.rope.methods import apply_method
from extend.search.data import HELD_OUT, SEARCH, Sizes, build_splits
from extend.search.measure import Meter
from extend.search.models import load_model, make_siblings
from extend.tokenizer import load_tokenizer
from tests.search.conftest import NATIVE_LEN, TARGET_LEN

CPU = torch.device("cpu")
SIZES = Sizes(rows=4, needles=2, short_tokens=3 * NATIVE_LEN, sibling_tokens=2 * NATIVE_LEN)


@pytest.fixture(scope="module")
def meter(base_dir: Path, sibling_dir: Path, text_file: Path) -> Meter:
    splits = build_splits(load_tokenizer(base_dir), text_file, {"sibling": None},
                          native_len=NATIVE_LEN, target_len=TARGET_LEN, sizes=SIZES, seed=0)
    return Meter(load_model(base_dir, CPU), {"sibling": load_model(sibling_dir, CPU)}, splits,
                 TARGET_LEN)


@pytest.fixture(scope="module")
def rope(base_dir: Path):
    return apply_method("yarn", read_config(base_dir).rope, TARGET_LEN, {})


def written_model(directory: Path, rope):
    """The checkpoint with the RoPE in its config, as `extend rescale` leaves it."""
    config = AutoConfig.from_pretrained(directory)
    config = type(config).from_dict(write_rope(read_config(directory).raw, rope, TARGET_LEN))
    return AutoModelForCausalLM.from_pretrained(directory, config=config,
                                                attn_implementation="sdpa").eval()


@torch.no_grad()
def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[:, :-1].double().log_softmax(-1)


def test_needle_losses_are_those_of_the_written_checkpoint(meter: Meter, base_dir: Path, rope):
    found = meter.needle(rope, TARGET_LEN, SEARCH)
    model, expected = written_model(base_dir, rope), []
    for row in meter.splits[SEARCH].rows(TARGET_LEN):
        ids = torch.tensor([row.ids])
        losses = -log_probs(model, ids).gather(2, ids[:, 1:, None])[0, :, 0]
        expected += [float(losses[low - 1:high - 1].mean()) for low, high in row.answers]
    assert len(found) == SIZES.rows * SIZES.needles
    # fp32 attention in another order of additions; losses are about 10.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_short_loss_and_divergence_are_those_of_whole_logits(meter: Meter, base_dir: Path, rope):
    loss, kl = meter.short(rope, SEARCH)
    windows = meter.splits[SEARCH].short
    native = log_probs(written_model(base_dir, read_config(base_dir).rope), windows)
    changed = log_probs(written_model(base_dir, rope), windows)
    expected = -changed.gather(2, windows[:, 1:, None]).squeeze(2).mean(1)
    torch.testing.assert_close(torch.tensor(loss).double(), expected, rtol=1e-5, atol=1e-5)
    expected = (native.exp() * (native - changed)).sum(-1).mean(1)
    torch.testing.assert_close(torch.tensor(kl).double(), expected, rtol=1e-3, atol=1e-5)
    assert min(kl) > 1e-3  # not a comparison of a model with itself


def test_disturbance_is_the_siblings_own_change(meter: Meter, sibling_dir: Path, rope):
    found = meter.disturbance(rope, HELD_OUT)
    windows = meter.splits[HELD_OUT].siblings["sibling"]
    own = log_probs(written_model(sibling_dir, read_config(sibling_dir).rope), windows)
    changed = log_probs(written_model(sibling_dir, rope), windows)
    expected = (own.exp() * (own - changed)).sum(-1).mean(1)
    assert list(found) == ["sibling"]
    torch.testing.assert_close(torch.tensor(found["sibling"]).double(), expected, rtol=1e-3,
                               atol=1e-5)


def test_the_native_rope_diverges_by_nothing(meter: Meter, base_dir: Path, rope):
    native = read_config(base_dir).rope
    before = meter.short(native, SEARCH)
    assert before[1] == [0.0] * len(before[1])
    assert meter.disturbance(native, SEARCH) == {"sibling": [0.0] * 4}
    meter.short(rope, SEARCH)  # and another RoPE in between leaves nothing behind
    assert meter.short(native, SEARCH) == before


def test_made_siblings_drift_as_asked(base_dir: Path):
    base = load_model(base_dir, CPU)
    made = make_siblings(base, ["a", "b"], 0.01, seed=3)
    weights = {name: m.model.state_dict() for name, m in made.items()}
    for name, own in base.model.state_dict().items():
        moved = [weights[k][name] - own for k in ("a", "b")]
        if ".layers." in name and own.ndim == 2:
            for delta in moved:
                torch.testing.assert_close(delta.norm() / own.norm(), torch.tensor(0.01),
                                           rtol=1e-3, atol=0)
            assert functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), 0) < 0.5
        else:
            assert all(float(delta.abs().max()) == 0 for delta in moved)
    again = make_siblings(base, ["a"], 0.01, seed=3)["a"].model.state_dict()
    for name, value in made["a"].model.state_dict().items():
        torch.testing.assert_close(value, again[name], rtol=0, atol=0)


def test_keys_for_other_engines_are_not_told_of_every_candidate(base_dir: Path, caplog,
                                                                monkeypatch):
    """transformers warns of short_mscale, which is written for vLLM and SGLang."""
    model = load_model(base_dir, CPU)
    rope = apply_method("longrope", model.own, TARGET_LEN, {
        "long_factor": [2.0] * (model.own.rotary_dim // 2), "attention_factor": 1.1})
    log = logging.getLogger("transformers.modeling_rope_utils")
    monkeypatch.setattr(log, "filters", [])  # the command line has one of its own
    caplog.set_level(logging.WARNING, log.name)
    log.addHandler(caplog.handler)
    try:
        set_rope(model.model, model.config.raw, rope, TARGET_LEN, CPU)
        assert "short_mscale" in caplog.text
        caplog.clear()
        model.use(rope, TARGET_LEN)
        assert not caplog.records
    finally:
        log.removeHandler(caplog.handler)
