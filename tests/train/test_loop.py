"""The same run on 1, 2 and 4 processes, and against plain transformers and torch.optim."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from extend.errors import (
    CheckpointError,
    DataError,
    LayoutError,
    RecipeError,
    TrainingError,
)
from extend.train import step as step_module
from extend.train.data import IGNORE, Row, load_rows
from extend.train.loop import run_process, train
from extend.train.optim import learning_rate
from extend.train_options import TrainOptions
from tests.spawn import spawn
from tests.train.tiny import (
    NATIVE_LEN,
    options,
    save_examples,
    save_model,
    save_text,
    save_tokenizer,
)

SCHEDULE = {"length": 128, "steps": 3, "lr": 1e-3, "rope": {"method": "ntk"}}
PER_PAIR = {"rope": {"method": "longrope", "options": {"long_factor": [1.0, 1.2, 2.0, 2.5]}}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("train")
    return {"directory": directory, "model": save_model(directory / "model"),
            "untied": save_model(directory / "untied", tied=False),
            "window": save_model(directory / "window", window=23),
            "gemma": save_gemma(directory / "gemma"),
            "text": save_text(directory), "examples": save_examples(directory)}


def save_gemma(directory: Path) -> Path:
    """A sliding and a full layer, each with its own RoPE."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=23,
        max_position_embeddings=NATIVE_LEN, layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def cases(files: dict[str, Path]) -> dict[str, TrainOptions]:
    """Runs that must not depend on the number of processes."""
    text = {"kind": "text", "path": str(files["text"])}
    mixed = [text, {"kind": "retrieval", "path": str(files["text"])},
             {"kind": "examples", "path": str(files["examples"])}]
    phase = SCHEDULE
    return {
        "cp": options(files["model"], mixed, answer_weight=0.3, schedule=[phase]),
        "dp": options(files["untied"], mixed, answer_weight=0.3, weight_decay=0.1,
                      schedule=[phase | {"batch_rows": 4}]),
        "crossing": options(files["model"], mixed, document_mask=False,
                            schedule=[phase | PER_PAIR | {"batch_rows": 3}]),
        "window": options(files["window"], mixed, schedule=[phase | {"batch_rows": 3}]),
        "layer-types": options(files["gemma"], mixed, schedule=[
            phase | {"rope": {"method": "yarn"}, "batch_rows": 3}]),
        "lora": options(files["model"], mixed, mode="lora", lora_rank=4,
                        trained_beside=["norms", "embeddings"],
                        schedule=[phase, phase | {"batch_rows": 2}]),
        "offload": options(files["untied"], mixed, answer_weight=0.3, weight_decay=0.1,
                           schedule=[phase | {"batch_rows": 4}], optimizer="adamw-offload"),
    }


def run_all(rank: int, world: int, runs: dict[str, dict], out: Path) -> None:
    for name, settings in runs.items():
        run_process(TrainOptions(**settings), out / f"{name}-{world}", False)


@pytest.fixture(scope="module")
def single(files: dict[str, Path]) -> Path:
    for name, run in cases(files).items():
        train(run, files["directory"] / f"{name}-1")
    return files["directory"]


@pytest.fixture(scope="module")
def double(files: dict[str, Path]) -> Path:
    runs = {name: run.model_dump() for name, run in cases(files).items()}
    spawn(2, run_all, runs, files["directory"])
    return files["directory"]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_close_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of the largest weight of each tensor.

    Sums in another order differ by 1e-7 or so; Adam's first steps divide each gradient by its own
    size, so where that is rounding noise a weight differs by up to a hundredth of the rate of 1e-3.
    """
    assert a.keys() == b.keys()
    for name in a:
        scale = a[name].abs().max().item()
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5 * scale, msg=lambda m,
                                   name=name: f"{name}: {m}")


def assert_same_run(a: Path, b: Path) -> None:
    for key in ("loss", "nll", "answer_nll", "lr", "grad_norm"):
        columns = [[line[key] or 0.0 for line in metrics(out)] for out in (a, b)]
        torch.testing.assert_close(*map(torch.tensor, columns), rtol=1e-5, atol=0)
    assert_close_weights(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))


@pytest.mark.parametrize("name", ["cp", "dp", "crossing", "window", "layer-types",
                                  "lora", "offload"])
def test_two_processes_equal_one(name: str, single: Path, double: Path):
    assert_same_run(single / f"{name}-1", double / f"{name}-2")


def test_offloaded_updates_equal_those_on_the_device(single: Path):
    """`dp` is the same run with weights, gradients and moments in one place."""
    assert_same_run(single / "dp-1", single / "offload-1")


def test_four_processes_with_two_rings_equal_one(files: dict[str, Path]):
    run = cases(files)["cp"].model_dump()
    # Two rings of two with three rows each, one ring of four, and two rings with one row each.
    run["schedule"] = [{**SCHEDULE, "steps": 1, "batch_rows": rows} for rows in (6, 1, 2)]
    train(TrainOptions(**run), files["directory"] / "grid-1")
    spawn(4, run_all, {"grid": run}, files["directory"])
    assert_same_run(files["directory"] / "grid-1", files["directory"] / "grid-4")


def row_loss(model: torch.nn.Module, row: Row, run: TrainOptions,
             totals: tuple[int, int]) -> torch.Tensor:
    """Share of one whole row in the loss: each of its documents in a forward of its own."""
    bounds = row.cu_seqlens if run.document_mask else (0, len(row.input_ids))
    loss = torch.zeros(())
    for begin, end in itertools.pairwise(bounds):
        ids, labels, answers = (torch.from_numpy(t[begin:end])
                                for t in (row.input_ids, row.labels, row.answers))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        nll = F.cross_entropy(logits, labels[1:], reduction="none", ignore_index=IGNORE)
        loss = loss + nll.sum() / totals[0] + run.answer_weight * nll[answers[1:]].sum() / totals[1]
    return loss


@pytest.mark.parametrize("name", ["dp", "crossing", "window", "layer-types"])
def test_equals_plain_transformers_and_torch(name: str, files: dict[str, Path], single: Path):
    """The same run without ring, chunks, checkpointing, micro-batches, or our optimizer."""
    run, out = cases(files)[name], single / f"{name}-1"
    phase = run.schedule[0]
    rows = load_rows(run, AutoTokenizer.from_pretrained(run.model))
    # The config that the run wrote has the RoPE it trained with.
    model = AutoModelForCausalLM.from_pretrained(
        run.model, config=AutoConfig.from_pretrained(out), attn_implementation="eager")
    decay = {"weight_decay": run.weight_decay}
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]} | decay,
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=run.betas)
    for step, line in enumerate(metrics(out)):
        batch = [rows.row(0, phase.batch_rows * step + i) for i in range(phase.batch_rows)]
        totals = (sum(int((r.labels[1:] != IGNORE).sum()) for r in batch),
                  sum(int(r.answers[1:].sum()) for r in batch))
        loss = sum(row_loss(model, r, run, totals) for r in batch)
        loss.backward()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip_norm)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, step)
        optimizer.step()
        optimizer.zero_grad()
    trained, start = (load_file(directory / "model.safetensors")
                      for directory in (out, Path(run.model)))
    plain = model.state_dict()
    assert_close_weights(trained, {name: plain[name] for name in start})
    assert all((trained[n] - start[n]).abs().max() > 1e-3 for n in start)  # and it did train


def test_output_is_a_checkpoint_of_the_new_length(files: dict[str, Path], single: Path):
    out = single / "lora-1"
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] > 10000
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 128
    assert "lm_head.weight" not in load_file(out / "model.safetensors")  # tied as it was
    assert AutoModelForCausalLM.from_pretrained(out).lm_head.weight is not None
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == "train" and manifest["seed"] == 0
    assert set(manifest["inputs"]) == {"model", "data[0]", "data[1]", "data[2]"}
    assert manifest["results"]["metrics"]["step"] == 6
    assert not (single / "lora-1.state").exists()


def test_metrics_have_one_line_per_step(single: Path):
    lines = metrics(single / "lora-1")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["phase"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert [line["tokens"] for line in lines] == [128, 256, 384, 640, 896, 1152]
    assert all(line["tokens_per_second"] > 0 and "mfu" not in line for line in lines)


def retrieval(**changes: object) -> dict:
    return {"kind": "retrieval"} | changes


@pytest.mark.parametrize(("changes", "data", "error", "match"), [
    # The model is not there: the length is refused before anything is read.
    ({"model": "/nowhere", "schedule": [SCHEDULE | {"length": 125}]}, retrieval(), LayoutError,
     "length 125 must be a multiple of"),
    ({"model": "/nowhere"}, retrieval(), CheckpointError, "/nowhere"),
    ({}, retrieval(path="/nowhere"), DataError, "/nowhere: no such file"),
    ({"schedule": [SCHEDULE | {"rope": {"method": "ntc"}}]}, retrieval(), RecipeError, "ntk"),
    ({"schedule": [SCHEDULE | {"length": 32}]}, retrieval(), RecipeError, "below the model's"),
    ({"trainable": ["q_proj", "typo"]}, retrieval(), RecipeError, "'typo' matches no parameter"),
])
def test_bad_runs_are_refused(changes: dict, data: dict, error: type, match: str,
                              files: dict[str, Path], tmp_path: Path):
    with pytest.raises(error, match=match):
        train(options(files["model"], [data], **({"schedule": [SCHEDULE]} | changes)),
              tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tokens_that_the_model_lacks_are_refused(files: dict[str, Path], tmp_path: Path):
    model = save_model(tmp_path / "model", vocab_size=90)  # bytes go up to 256
    with pytest.raises(DataError, match=r"has the token \d+, but the embeddings of .* end at 89"):
        train(options(model, [{"kind": "text", "path": str(files["text"])}], schedule=[SCHEDULE]),
              tmp_path / "out")


def test_a_step_without_anything_to_predict_is_refused(files: dict[str, Path], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch):
    build = step_module.build_batch

    def ignoring(*args, **kwargs):
        batch = build(*args, **kwargs)
        return replace(batch, labels=torch.full_like(batch.labels, IGNORE))

    monkeypatch.setattr(step_module, "build_batch", ignoring)
    with pytest.raises(TrainingError, match="step 1 of phase 1: no token of rows 0 to 0 of .*text"):
        train(options(files["model"], [{"kind": "text", "path": str(files["text"])}],
                      schedule=[SCHEDULE | {"batch_rows": 1}]), tmp_path / "out")


def test_a_window_shorter_than_the_rows_is_told(files: dict[str, Path], tmp_path: Path,
                                                caplog: pytest.LogCaptureFixture):
    for length, told in ((16, False), (64, True)):
        phase = SCHEDULE | {"length": length, "steps": 1, "rope": None}
        train(options(files["window"], [{"kind": "text", "path": str(files["text"])}],
                      schedule=[phase]), tmp_path / str(length))
        message = "2 of 2 layers of .* see a sliding window of 23 tokens, not all 64 of a row"
        assert bool(re.search(message, caplog.text)) == told


def test_existing_output_is_not_replaced_unasked(files: dict[str, Path], single: Path):
    with pytest.raises(CheckpointError, match="exists already"):
        train(cases(files)["cp"], single / "cp-1")
