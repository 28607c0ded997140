"""A loss that is not finite or explodes: whose fault it is, and what is done."""

import json
import logging
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.errors import TrainingError
from extend.train import train
from extend.train.bad_steps import LossHistory
from extend.train.loop import run_process
from extend.train.step import build_step
from extend.train_options import TrainOptions
from tests.spawn import spawn
from tests.train.tiny import options, save_model, save_text

POISON = "~"
PLACE = 7  # of the document that holds it, from 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A model that knows one character as NaN, which one document holds."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("bad")
    model, text = save_model(directory / "model", tied=False), save_text(directory, count=9)
    lines = text.read_text().splitlines()
    lines[PLACE - 1] = json.dumps({"text": f"Once {POISON}."})
    text.write_text("\n".join(lines) + "\n")
    weights = load_file(model / "model.safetensors")
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    weights["model.embed_tokens.weight"][vocabulary[POISON]] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return options(model, [{"kind": "text", "path": str(text)}], save_every=3,
                   schedule=[{"length": 64, "steps": 8, "batch_rows": 2, "lr": 1e-3}])


def test_the_row_and_the_document_are_named(run: TrainOptions, tmp_path: Path):
    with pytest.raises(TrainingError) as stopped:
        train(run, tmp_path / "out")
    told = str(stopped.value)
    assert "loss nan" in told and told.count("row ") == 1 and "set bad_loss skip" in told
    documents = told.partition("document ")[2].partition(" of ")[0]
    assert str(PLACE) in documents.split(", ") and "text.jsonl" in told


def test_bad_steps_are_skipped_up_to_a_limit(run: TrainOptions, tmp_path: Path,
                                             caplog: pytest.LogCaptureFixture):
    with pytest.raises(TrainingError, match="set bad_loss skip"):
        train(run, tmp_path / "out")  # goes on below, with another policy
    skip = run.model_copy(update={"bad_loss": "skip"})
    with caplog.at_level(logging.WARNING, logger="extend.train.step"):
        train(skip, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().split("\n")
             if line]
    skipped = [line["step"] for line in lines if "skipped" in line]
    assert len(lines) == 8 and skipped and len(skipped) < 8
    assert all(lines[step - 1]["loss"] is None for step in skipped)
    assert sum("the step is skipped" in record.getMessage() for record in caplog.records) == len(
        skipped)
    head = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    assert head.isfinite().all()
    few = skip.model_copy(update={"max_skipped_steps": 1})
    if len(skipped) > 1:
        with pytest.raises(TrainingError, match="1 steps were skipped before it, as many as max_"):
            train(few, tmp_path / "few")


def test_an_exploding_loss():
    history = LossHistory()
    for _ in range(10):
        history.add(0, 2.0, False)
    assert history.judge(0, 6.9, 1.0, 5.0) is None
    assert history.judge(0, 7.1, 1.0, None) is None
    assert history.judge(1, 7.1, 1.0, 5.0) is None  # a phase begins with other rows
    assert "loss 7.100, which is more than max_loss_rise 5 above the median 2.000" in history.judge(
        0, 7.1, 1.0, 5.0)
    lines = [json.dumps({"step": n + 1, "phase": 1, "nll": 2.0 + n}) + "\n" for n in range(9)]
    again = LossHistory.read([*lines, '{"step": 10'], step=8)
    assert again.nlls == [2.0 + n for n in range(8)] and again.skipped == 0


def train_on_other_rows(rank: int, world: int, run: str, out: str) -> str:
    """The second process draws its rows with another seed."""
    step = import_module("extend.train.step")
    if rank == 1:
        def build(run, number, mesh, at):
            run.rows.sources[0].stream._passes.seed = 99
            return build_step(run, number, mesh, at)

        step.build_step = build
    try:
        run_process(TrainOptions.model_validate_json(run), Path(out), False)
    except TrainingError as error:
        return str(error)
    return "trained"


def test_processes_that_share_a_row_must_read_the_same(tmp_path: Path):
    model, text = save_model(tmp_path / "model"), save_text(tmp_path)
    run = options(model, [{"kind": "text", "path": str(text)}], nproc=2,
                  schedule=[{"length": 128, "steps": 2, "lr": 1e-3}])
    for told in spawn(2, train_on_other_rows, run.model_dump_json(), str(tmp_path / "out")):
        assert "step 1 of phase 1: processes 0 and 1 share rows, but read different ones" in told
        assert "text.jsonl" in told
