"""Lengths, numbers and cross-field rules of the option models."""

from typing import get_args

import pytest
from pydantic import ValidationError

from extend.adapter_options import ExtractOptions
from extend.option_types import parse_length
from extend.train_options import STRATEGIES, Phase, TrainOptions


@pytest.mark.parametrize(("text", "tokens"), [
    ("8k", 8192), ("128k", 131072), ("1m", 1048576), ("1M", 1048576), (4096, 4096), ("1.5k", 1536)])
def test_lengths_are_tokens(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "8kb", "-1", 0, "1.3", True, None, "1e3"])
def test_other_text_is_not_a_length(text):
    with pytest.raises(ValueError, match="not a length in tokens"):
        parse_length(text)


def test_numbers_that_yaml_reads_as_text():
    phase = Phase.model_validate({"length": "1k", "steps": 2, "lr": "1e-5",
                                  "rope": {"method": "theta", "options": {"rope_theta": "2.8e9"}}})
    assert phase.lr == 1e-5
    assert phase.rope.options == {"rope_theta": 2.8e9}


def test_phase_takes_steps_or_tokens():
    assert Phase(length=1024, tokens="8k", lr=1e-4, batch_rows=2).num_steps == 4
    for wrong in ({}, {"steps": 1, "tokens": 1024}):
        with pytest.raises(ValidationError, match="either steps or tokens"):
            Phase(length=1024, lr=1e-4, **wrong)


def test_schedule_must_not_shrink():
    phases = [{"length": 2048, "steps": 1, "lr": 1e-4}, {"length": 1024, "steps": 1, "lr": 1e-4}]
    with pytest.raises(ValidationError, match=r"must not shrink, they are \[2048, 1024\]"):
        TrainOptions(model="m", schedule=phases, data=[{"kind": "text", "path": "p"}])


def test_rope_is_not_made_for_less_than_the_rows():
    with pytest.raises(ValidationError, match="rope_to is 512 but rows have 1024 tokens"):
        Phase(length=1024, steps=1, lr=1e-4, rope="auto", rope_to=512)
    assert Phase(length=1024, steps=1, lr=1e-4, rope="auto", rope_to=1024).rope_to == 1024


def test_a_length_for_a_rope_needs_a_rope():
    phase = {"length": 1024, "steps": 1, "lr": 1e-4, "rope_to": 4096}
    rest = {"model": "m", "data": [{"kind": "text", "path": "p"}]}
    with pytest.raises(ValidationError, match="rope_to is 4096 but no rope says how"):
        TrainOptions(schedule=[phase], **rest)
    assert TrainOptions(schedule=[phase], rope="auto", **rest).rope.method == "critical"
    assert TrainOptions(schedule=[phase | {"rope": "auto"}], **rest).rope is None


def train_options(**changes: object) -> TrainOptions:
    return TrainOptions(model="m", schedule=[{"length": 1024, "steps": 1, "lr": 1e-4}],
                        data=[{"kind": "text", "path": "p"}], **changes)


@pytest.mark.parametrize("strategy", ["auto", "ring", "all-gather", "ulysses", "usp", "usp:4",
                                      "double-ring", "double-ring:16"])
def test_strategies_are_accepted(strategy: str):
    assert train_options(strategy=strategy).strategy == strategy


@pytest.mark.parametrize("strategy", ["rign", "usp:", "usp:0", "usp:-1", "usp:two", "ring:2",
                                      "auto:2", "usp:4 ", "", None, 4])
def test_other_strategies_are_not(strategy: object):
    with pytest.raises(ValidationError, match=r"is no strategy; write one of auto, ring, all-ga.*"
                                              r" ulysses, usp\[:N\], double-ring\[:N\]"):
        train_options(strategy=strategy)


def test_names_are_those_of_the_ring():
    """They are written down twice, because options are read without torch."""
    from extend.ring import LAYOUTS
    from extend.ring.strategies import STRATEGIES as OF_THE_RING
    from extend.ring.strategies import parse_strategy

    assert set(STRATEGIES) == {"auto", *OF_THE_RING}
    for name, takes_number in STRATEGIES.items():
        assert parse_strategy(name) == (name, None)
        if takes_number:
            assert parse_strategy(f"{name}:3") == (name, 3)
    assert set(get_args(TrainOptions.model_fields["layout"].annotation)) == set(LAYOUTS)


def test_documents_are_masked_unless_told():
    assert train_options().document_mask
    assert not train_options(document_mask=False).document_mask


def test_rank_and_energy_exclude_each_other():
    with pytest.raises(ValidationError, match=r"rank \(8\) and energy \(0.9\)"):
        ExtractOptions(base="a", tuned="b", rank=8, energy=0.9)


def test_auto_is_the_method_that_composes():
    run = train_options(rope="auto")
    assert (run.rope.method, run.rope.options) == ("critical", {})
    assert TrainOptions.model_validate(run.model_dump()) == run
    with pytest.raises(ValidationError, match="'atuo' is no RoPE; write auto, or a mapping"):
        train_options(rope="atuo")


@pytest.mark.parametrize(("given", "message"), [
    ({"rank": 8, "adapter_bytes": 900}, r"rank \(8\) and adapter_bytes \(900\) exclude"),
    ({"energy": 0.9, "adapter_bytes": 900}, r"energy \(0.9\) and adapter_bytes \(900\) exclude"),
    ({"adapter_bytes": 0}, "greater than or equal to 1")])
def test_a_size_is_a_criterion_of_its_own(given: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        ExtractOptions(base="a", tuned="b", **given)
    assert ExtractOptions(base="a", tuned="b", adapter_bytes=900, exact=True).exact
