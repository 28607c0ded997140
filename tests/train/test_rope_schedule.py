"""Which RoPE each phase of a train stage gets."""

import logging
from pathlib import Path

import pytest

from extend.model_config import read_config
from extend.rope.methods import apply_method
from extend.train.loop import train
from extend.train.session import plan_ropes
from extend.train_options import TrainOptions
from tests.train.tiny import NATIVE_LEN, options, save_model

DATA = [{"kind": "retrieval"}]
PHASE = {"steps": 1, "lr": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("schedule") / "model")


def thetas(run: TrainOptions) -> list[float]:
    return [rope.rope_theta for rope in plan_ropes(run, world=1)]


def run_of(model: Path, *phases: dict, **changes: object) -> TrainOptions:
    return options(model, DATA, schedule=[PHASE | phase for phase in phases], **changes)


def theta_at(model: Path, length: int, method: str = "critical") -> float:
    return apply_method(method, read_config(model).rope, length, {}).rope_theta


def test_auto_gives_each_phase_the_theta_of_its_length(model):
    run = run_of(model, {"length": 32}, {"length": NATIVE_LEN}, {"length": 256}, {"length": 1024},
                 rope="auto")
    assert thetas(run) == [1e4, 1e4, theta_at(model, 256), theta_at(model, 1024)]


def test_a_phase_may_look_ahead_and_is_not_undone_by_the_next(model):
    run = run_of(model, {"length": 128, "rope_to": 1024}, {"length": 512}, {"length": 2048},
                 rope={"method": "ntk"})
    assert thetas(run) == [theta_at(model, 1024, "ntk"), theta_at(model, 1024, "ntk"),
                           theta_at(model, 2048, "ntk")]


def test_the_rope_of_a_phase_comes_first(model):
    run = run_of(model, {"length": 128, "rope": {"method": "ntk"}}, {"length": 256}, rope="auto")
    assert thetas(run) == [theta_at(model, 128, "ntk"), theta_at(model, 256)]


def test_without_a_rope_phases_keep_the_last_one(model):
    run = run_of(model, {"length": 64}, {"length": 128, "rope": "auto"}, {"length": 256})
    assert thetas(run) == [1e4, theta_at(model, 128), theta_at(model, 128)]


def test_rows_that_outgrow_their_rope_are_told(model, tmp_path, caplog):
    phases = [{"length": 128}, {"length": 256}]
    for rope, told in ((None, 2), ("auto", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train(run_of(model, *phases, rope=rope), tmp_path / str(rope))
        found = [text for text in caplog.messages if "RoPE is made for" in text]
        assert len(found) == told
    # The last RoPE made counts, not the model's own.
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(run_of(model, {"length": 128, "rope": "auto"}, {"length": 256}), tmp_path / "last")
    (message,) = [text for text in caplog.messages if "RoPE is made for" in text]
    assert "rows of 256 tokens are longer than the 128" in message


def test_a_schedule_that_does_not_compose_is_told_once(model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(run_of(model, {"length": 128}, {"length": 256}, rope={"method": "gradient-v1"}),
              tmp_path / "out")
    warnings = [text for text in caplog.messages if "RoPE schedule" in text]
    at_once = theta_at(model, 256, "gradient-v1")
    assert len(warnings) == 1
    assert f"theta {at_once:.10g}" in warnings[0]
