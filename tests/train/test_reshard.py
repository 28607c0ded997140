"""Shards hold their part of the file, and of a checkpoint that other processes have written."""

import hashlib
import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from extend.errors import TrainingError
from extend.train.data import Row, Rows
from extend.train.export_step import export_step
from extend.train.loop import run_process
from extend.train_options import TrainOptions
from tests.spawn import spawn
from tests.train.test_loop import assert_close_weights
from tests.train.test_state import SignalAt
from tests.train.test_weights import FAMILIES, assert_shards, fill_shards, save
from tests.train.tiny import options, save_model, save_text

Seen = set[tuple[int, int, str]]


@contextmanager
def recorded_rows() -> Iterator[Seen]:
    """Phase, index and hash of every row that this process trains on."""
    seen: Seen = set()
    plain = Rows.row

    def row(self: Rows, phase: int, index: int) -> Row:
        found = plain(self, phase, index)
        seen.add((phase, index, hashlib.sha256(found.input_ids.tobytes()).hexdigest()))
        return found

    with mock.patch.object(Rows, "row", row):
        yield seen


def run_parts(rank: int, world: int, parts: list[tuple[dict, Path, int | None]],
              ) -> list[tuple[Seen, list[str]]]:
    """Run each, until the step after which a signal comes or to its end; what it read and told."""
    logger, results = logging.getLogger("extend.train"), []
    logger.setLevel(logging.INFO)
    for settings, out, stop in parts:
        told, keeper = [], logging.Handler()
        keeper.emit = lambda record, told=told: told.append(record.getMessage())
        handlers = [keeper, *([] if stop is None else [SignalAt(stop, signal.SIGTERM)])]
        for handler in handlers:
            logger.addHandler(handler)
        try:
            with recorded_rows() as seen:
                run_process(TrainOptions(**settings), out, False)
        except TrainingError as error:
            assert "stopped by a signal after step 2 of 4" in str(error)
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
        results.append((seen, told))
    logger.setLevel(logging.NOTSET)
    return results


def run_and_fill(rank: int, world: int, parts: list, models: dict[str, Path]) -> tuple:
    """One start of four processes for both."""
    return fill_shards(rank, world, models), run_parts(rank, world, parts)


CASES = {(2, 1): False, (1, 2): True, (4, 2): True}
"""Processes before and after, and whether checkpoints are written in the background."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Undisturbed and resumed runs: name -> directory, rows of both parts, and what was told."""
    top = tmp_path_factory.mktemp("reshard")
    torch.set_num_threads(1)
    model, text = save_model(top / "model"), save_text(top)
    run = options(model, [{"kind": "text", "path": str(text)}], save_every=100, schedule=[
        {"length": 64, "steps": 3, "batch_rows": 2, "lr": 3e-3},
        {"length": 128, "steps": 1, "lr": 1e-3, "rope": {"method": "ntk"}}])
    runs = {case: run.model_copy(update={"save_in_background": background}).model_dump()
            for case, background in CASES.items()}
    outs = {case: top / "{}-to-{}".format(*case) for case in CASES}
    before, after = ({case: (runs[case], outs[case], stop) for case in CASES} for stop in (1, None))
    [undisturbed, first_1] = run_parts(0, 1, [(run.model_dump(), top / "whole", None),
                                              before[1, 2]])
    models = {name: save(FAMILIES[name], top / name) for name in ("llama", "llama-tied")}
    shards, first_4 = zip(*spawn(4, run_and_fill, [before[4, 2]], models), strict=True)
    middle = spawn(2, run_parts, [before[2, 1], after[1, 2], after[4, 2]])
    export_step(outs[2, 1].with_name("2-to-1.state"), top / "exported")
    [last] = run_parts(0, 1, [after[2, 1]])
    return {
        "top": top, "whole": undisturbed[0], "outs": outs, "models": models, "shards": shards,
        "rows": {(2, 1): ([r[0] for r in middle], [last]),
                 (1, 2): ([first_1], [r[1] for r in middle]),
                 (4, 2): ([r[0] for r in first_4], [r[2] for r in middle])}}


def test_shards_hold_their_part_of_the_file(finished: dict):
    assert_shards(finished["models"], finished["shards"])


@pytest.mark.parametrize("case", CASES)
def test_going_on_with_other_processes(case: tuple[int, int], finished: dict):
    out = finished["outs"][case]
    whole, resumed = ([json.loads(line) for line in (directory / "metrics.jsonl").open()]
                      for directory in (finished["top"] / "whole", out))
    for key in ("step", "phase", "lr", "tokens"):
        assert [line[key] for line in resumed] == [line[key] for line in whole]
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(*(torch.tensor([line[key] for line in lines])
                                     for lines in (resumed, whole)), rtol=1e-5, atol=0)
    assert_close_weights(load_file(out / "model.safetensors"),
                         load_file(finished["top"] / "whole" / "model.safetensors"))
    first, second = ([set().union(*(seen for seen, _ in part))] for part in finished["rows"][case])
    # Exactly the rows of the undisturbed run; the next step's may have been built when it stopped.
    assert second[0] == {row for row in finished["whole"] if row[0] == 1 or row[1] >= 4}
    assert {row for row in finished["whole"] if row[0] == 0 and row[1] < 4} <= first[0]
    assert first[0] <= finished["whole"]
    told = [line for _, lines in finished["rows"][case][1] for line in lines]
    assert [line for line in told if "going on with" in line] == [
        f"{out}.state: going on with {case[1]} processes; the steps before ran on {case[0]}"]


def test_a_step_of_two_processes_is_exported_by_one(finished: dict):
    """The weights themselves are compared where one process wrote them; here it is that it can."""
    exported = load_file(finished["top"] / "exported" / "model.safetensors")
    config = json.loads((finished["top"] / "exported" / "config.json").read_text())
    assert config["max_position_embeddings"] == 64  # of the first phase
    assert config["rope_theta"] == 10000
    lines = (finished["top"] / "exported" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert exported.keys() == load_file(finished["top"] / "whole" / "model.safetensors").keys()
