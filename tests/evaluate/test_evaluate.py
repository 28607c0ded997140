import json
import logging
import os
import shutil
import signal

import pytest
import torch
from transformers import LlamaForCausalLM

from extend.errors import CheckpointError, DataError, ExtendError, RecipeError
from extend.evaluate import cells as cells_module
from extend.evaluate import evaluate
from extend.evaluate.cells import Job
from extend.evaluate.frame import Frame
from extend.evaluate.plan import Unit
from extend.evaluate.tasks import TASKS
from extend.evaluate.workers import count_processes, score_in_processes
from extend.tokenizer import load_tokenizer

GRID = {"lengths": [256, 768], "depths": 2, "trials": 2}


@pytest.fixture(scope="session")
def tasks(text_file, tmp_path_factory):
    skill = tmp_path_factory.mktemp("skill") / "skill.jsonl"
    skill.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n"
                             for i in range(20)))
    return ["passkey", {"task": "passkey-text", "haystack": str(text_file), "lengths": [300]},
            {"task": "exact-match", "file": str(skill), "name": "adding"},
            {"task": "loss", "text": str(text_file), "window": 128, "max_tokens": 1024}]


@pytest.fixture(scope="session")
def whole(model_dir, tasks, tmp_path_factory):
    """One complete evaluation: the file's bytes."""
    out = tmp_path_factory.mktemp("whole") / "eval"
    path = evaluate(model_dir, out, tasks=tasks, **GRID)
    assert path == out / "results.json"
    return path.read_bytes()


def test_every_cell_has_its_row(whole, model_dir):
    results = json.loads(whole)
    assert results["schema"] == 1
    assert results["model"]["max_position_embeddings"] == 512
    assert results["model"]["path"] == str(model_dir) and len(results["model"]["sha256"]) == 64
    assert results["model"]["rope"]["rope_theta"] == 10000.0
    assert [(r["name"], r["length"], r["depth"], r["control"], r["n"], r["beyond_native"])
            for r in results["rows"]] == [
        ("passkey", 256, 0.0, None, 2, False), ("passkey", 256, 1.0, None, 2, False),
        ("passkey", 768, 0.0, None, 2, True), ("passkey", 768, 1.0, None, 2, True),
        ("passkey", 256, None, "no-needle", 2, False),
        ("passkey-text", 300, 0.0, None, 2, False), ("passkey-text", 300, 1.0, None, 2, False),
        ("passkey-text", 300, None, "no-needle", 2, False),
        ("adding", None, None, None, 20, False), ("loss", 128, None, None, 8, False)]
    assert set(results["summary"]["tasks"]) == {"passkey", "passkey-text"}
    assert results["summary"]["tasks"]["passkey"]["lengths"]["768"]["n"] == 4
    assert results["summary"]["effective_length"] == 0


def test_loss_is_that_of_transformers(whole, model_dir, text_file):
    row = json.loads(whole)["rows"][-1]
    task = TASKS["loss"](text=str(text_file), window=128, max_tokens=1024)
    cell, = task.cells("loss", (), (), 0)
    ids = torch.tensor([p.ids for p in task.prompts(Frame.of(load_tokenizer(model_dir)), cell, 0)])
    model = LlamaForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        losses = torch.stack([model(w[None], labels=w[None]).loss for w in ids]).double()
    # Stored with six decimals, from fp32 sums over 127 tokens.
    assert row["loss"] == pytest.approx(float(losses.mean()), abs=2e-5)
    assert row["stderr"] == pytest.approx(float(losses.std()) / 8 ** 0.5, abs=2e-5)
    assert row["tokens"] == 8 * 127 and row["score"] is None


def test_interrupted_run_goes_on_and_ends_the_same(whole, model_dir, tasks, tmp_path, monkeypatch):
    out, calls = tmp_path / "eval", []
    score_unit = cells_module.score_unit

    def stop_after_three(*args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args[2].cells[0].key)
        return score_unit(*args, **kwargs)

    monkeypatch.setattr(cells_module, "score_unit", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_dir, out, tasks=tasks, **GRID)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".eval.rows"]
    with (tmp_path / ".eval.rows" / "rows-0.jsonl").open("a") as file:
        file.write('{"cell": "passkey|2')  # what a kill in the middle of a write leaves
    done = list(calls)

    def count(*args, **kwargs):
        calls.append(args[2].cells[0].key)
        return score_unit(*args, **kwargs)

    monkeypatch.setattr(cells_module, "score_unit", count)
    path = evaluate(model_dir, out, tasks=tasks, **GRID)
    assert path.read_bytes() == whole
    assert len(calls) == len(set(calls)) == 10 and calls[:3] == done
    assert [p.name for p in tmp_path.iterdir()] == ["eval"]


def test_rows_do_not_depend_on_the_number_of_processes(whole, model_dir, tasks, tmp_path):
    path = evaluate(model_dir, tmp_path / "eval", tasks=tasks, nproc=2, device="cpu", **GRID)
    assert path.read_bytes() == whole


def test_error_of_a_process_is_told_as_it_is(tmp_path):
    job = Job(model=str(tmp_path / "none"), adapter=None, device="cpu", dtype="float32", chunk=512,
              seed=0, rows=tmp_path)
    task = TASKS["passkey"]()
    work = [(task, cell) for cell in task.cells("x", [256], [0.0, 1.0], 1)]
    with pytest.raises(ExtendError, match=r"^.*none/config.json: no such file"):
        score_in_processes(job, work, 2)
    assert count_processes("auto", "cpu") == 1


def test_manifest_records_inputs(whole, model_dir, tasks, tmp_path):
    evaluate(model_dir, tmp_path / "eval", tasks=tasks[1:2], depths=1, trials=1)
    manifest = json.loads((tmp_path / "eval" / "manifest.json").read_text())
    assert manifest["stage"] == "eval" and manifest["seed"] == 0
    assert set(manifest["inputs"]) == {"model", "passkey-text.haystack"}
    assert manifest["options"]["dtype"] == "float32"
    assert list(manifest["outputs"]) == ["results.json"]


def test_progress_is_logged(model_dir, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="extend"):
        evaluate(model_dir, tmp_path / "e", tasks=["passkey"], lengths=[256], depths=1, trials=2)
    assert "passkey 256 depth 0.50: 0/2 (1 of 2, " in caplog.text


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"tasks": ["passkey"], "lengths": [100]}, DataError, "a length of 100 leaves no room"),
    ({"tasks": ["passkey"], "nproc": 0}, RecipeError, "nproc: 0 is neither auto nor"),
    ({"tasks": ["passkey"], "chunk": 0}, RecipeError, "chunk: 0 is not"),
    ({"tasks": ["passkey"], "dtype": "int8"}, RecipeError, "dtype: unknown 'int8'"),
    ({"tasks": [{"task": "loss", "text": "nowhere"}]}, DataError, "nowhere: no such file"),
])
def test_wrong_requests_leave_nothing_behind(model_dir, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        evaluate(model_dir, tmp_path / "eval", **{"lengths": [256], "depths": 1, **changes})
    assert list(tmp_path.iterdir()) == []


def test_missing_model_and_present_output(model_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        evaluate(tmp_path / "none", tmp_path / "eval", tasks=["passkey"], lengths=[256])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists already"):
        evaluate(model_dir, tmp_path / "eval", tasks=["passkey"], lengths=[256])
    assert (tmp_path / "eval" / "mine.txt").read_text() == "keep"


def test_tokenizer_without_bos_gives_other_prompts(model_dir, whole, tmp_path):
    from tests.tiny_text import make_tokenizer

    shutil.copytree(model_dir, tmp_path / "m")
    make_tokenizer("bytes").save_pretrained(tmp_path / "m")
    path = evaluate(tmp_path / "m", tmp_path / "eval", tasks=["passkey"], lengths=[256], depths=2,
                    trials=2)
    rows, with_bos = json.loads(path.read_text())["rows"], json.loads(whole)["rows"]
    assert rows[0]["actual_length"] == with_bos[0]["actual_length"] == 256
    assert rows[0]["prompt_sha256"] != with_bos[0]["prompt_sha256"]


class KillsItself(TASKS["passkey"]):
    """A task whose process dies, as when memory runs out."""

    def prompts(self, frame, cell, seed):
        os.kill(os.getpid(), signal.SIGKILL)


def test_death_of_a_process_is_told(model_dir, tmp_path):
    job = Job(model=str(model_dir), adapter=None, device="cpu", dtype="float32", chunk=512,
              seed=0, rows=tmp_path)
    task = KillsItself()
    work = [Unit(task, (cell,)) for cell in task.cells("x", [256], [0.0], 1)]
    with pytest.raises(ExtendError, match=r"process [01] of 2 died \(SIGKILL.*same command"):
        score_in_processes(job, work, 2)


def test_the_base_is_one_more_control(model_dir, tmp_path):
    """The model as its own base: cells at the native length must score as the model's do."""
    path = evaluate(model_dir, tmp_path / "eval", tasks=["passkey"], lengths=[256, 512], depths=2,
                    trials=2, base=model_dir)
    rows = json.loads(path.read_text())["rows"]
    native = json.loads(path.read_text())["model"]["max_position_embeddings"]
    base = [row for row in rows if row["control"] == "base"]
    assert [(row["length"], row["depth"]) for row in base] == [(native, 0.0), (native, 1.0)]
    same = evaluate(model_dir, tmp_path / "same", tasks=["passkey"], lengths=[native], depths=2,
                    trials=2)
    for row, other in zip(base, json.loads(same.read_text())["rows"], strict=False):
        assert {**row, "control": None} == other
