"""Evaluation by processes that share each row: their rows, and what they say when one fails."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from extend.errors import CompatibilityError, DataError, ExtendError, RankError, RecipeError
from extend.evaluate.cells import Job, score_units
from extend.evaluate.plan import order_units, plan_tasks
from extend.evaluate.ring_workers import count_ranks, follow, is_follower, score_on_ring
from extend.evaluate.rows import RowStore
from extend.evaluate.tasks.passkey import Passkey
from tests.spawn import spawn


def units_of(lengths, text_file):
    loss = {"task": "loss", "text": str(text_file), "window": 100, "max_tokens": 300}
    return order_units(plan_tasks(["passkey", loss], lengths=lengths, depths=2, trials=2))


def job_of(model_dir, directory, chunk=96):
    RowStore.open(directory, {})
    return Job(str(model_dir), None, "cpu", "float32", chunk, 0, directory)


class Unwell(Passkey):
    """Fails on the second rank, when the others have begun."""

    def prompts(self, frame, cell, seed):
        prompts = super().prompts(frame, cell, seed)
        if dist.get_rank() == 1:
            self.fail()
        return prompts


class Refuses(Unwell):
    def fail(self):
        raise DataError("the second rank's text is missing")


class Breaks(Unwell):
    def fail(self):
        return 1 // 0


class Dies(Unwell):
    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)


def assert_same_rows(found, expected):
    """Equal, but for losses: sums of some hundred fp32 terms in another order, then rounded."""
    assert list(found) == list(expected)
    for key, row in expected.items():
        for name, value in row.items():
            if name in ("answer_loss", "loss", "stderr") and value is not None:
                torch.testing.assert_close(found[key][name], value, rtol=1e-5, atol=2e-6)
            else:
                assert found[key][name] == value


@pytest.fixture(scope="module")
def expected(model_dir, text_file, tmp_path_factory):
    job = job_of(model_dir, tmp_path_factory.mktemp("one") / "rows")
    score_units(job, units_of([256, 301], text_file))
    return RowStore(job.rows).read()


def test_rows_are_those_of_one_process(model_dir, text_file, tmp_path, expected):
    job = job_of(model_dir, tmp_path / "rows")
    score_on_ring(job, units_of([256, 301], text_file), 2)
    assert_same_rows(RowStore(job.rows).read(), expected)
    assert [path.name for path in job.rows.glob("rows-*")] == ["rows-0.jsonl"]  # rank 0 writes
    assert len(expected) == 7


def run_as_launched(rank, world, model_dir, directory, text_file):
    """What rank 0 and the others do under torchrun."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    assert count_ranks(1, "cpu") == count_ranks(world, "cpu") == world
    with pytest.raises(RecipeError, match="context_parallel is 3, but the launcher started 2"):
        count_ranks(3, "cpu")
    for lengths in ([256, 301], None):  # the second time there is nothing to do
        if is_follower():
            follow()
        else:
            units = units_of(lengths, text_file) if lengths else []
            score_on_ring(job_of(model_dir, directory), units, world)
    assert dist.is_initialized()  # what was there is left as it was


def test_processes_of_a_launcher_are_told_what_to_do(model_dir, text_file, tmp_path, expected):
    spawn(2, run_as_launched, model_dir, tmp_path / "rows", text_file)
    assert_same_rows(RowStore(tmp_path / "rows").read(), expected)


@pytest.mark.parametrize(("task", "kind", "message"), [
    (Refuses, DataError, "^the second rank's text is missing$"),
    (Breaks, ExtendError, "(?s)a rank of 2 of the evaluation failed:.*ZeroDivisionError"),
    (Dies, RankError, "SIGKILL|not heard from rank 1|rank 1 of")])
def test_one_rank_that_fails_ends_all_with_its_cause(model_dir, tmp_path, task, kind, message):
    job, done = job_of(model_dir, tmp_path / "rows"), plan_tasks(["passkey"], lengths=[256],
                                                                 depths=1, trials=1)
    cells = done[0].cells
    units = [type(unit)(task(), unit.cells) for unit in order_units(done)]
    with pytest.raises(kind, match=message) as error:
        score_on_ring(job, units, 2)
    assert type(error.value) is kind
    assert not list(job.rows.glob("ring-error-*")) and len(cells) == 3
    assert RowStore(job.rows).read() == {}


def test_what_cannot_be_started_is_refused(monkeypatch):
    assert count_ranks(3, "cpu") == 3
    with pytest.raises(RecipeError, match="0 is not a number of at least 1"):
        count_ranks(0, "cpu")
    with pytest.raises(CompatibilityError, match="each process takes a GPU of its own"):
        count_ranks(2, "cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CompatibilityError, match="context_parallel is 3 but torch sees 2 CUDA"):
        count_ranks(3, "auto")
