"""Rows of several lengths of documents, two RoPEs and two losses in one step, on 1, 2 and 4
processes."""

import itertools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from extend.errors import DataError, RecipeError
from extend.train import step
from extend.train.data import IGNORE, Row, load_rows
from extend.train.loop import run_process, train
from extend.train_options import TrainOptions
from tests.spawn import spawn
from tests.train.tiny import NATIVE_LEN, options, save_examples, save_model, save_text

LENGTH = 256
KEYS = ("loss", "nll", "answer_nll", "divergence", "grad_norm")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("mixed")
    return {"directory": directory, "model": save_model(directory / "model"),
            "text": save_text(directory / "data"), "examples": save_examples(directory / "data")}


def mixed_run(files: dict[str, Path], **changes: object) -> TrainOptions:
    """Short documents under the model's own RoPE beside whole ones and one of a row's length."""
    text = {"kind": "text", "path": str(files["text"])}
    data = [text | {"name": "short", "document_length": NATIVE_LEN // 2, "rope": "native"},
            text | {"name": "long", "upsample": {"min_length": 60, "factor": 2.5}},
            {"kind": "examples", "path": str(files["examples"]), "rope": "native"},
            {"kind": "retrieval", "path": str(files["text"])},
            text | {"name": "kept", "document_length": NATIVE_LEN // 2, "distill": True},
            text | {"name": "whole", "document_length": NATIVE_LEN // 2, "join": True,
                    "distill": True}]
    phase = {"length": LENGTH, "steps": 1, "lr": 1e-3, "rope": {"method": "ntk"}}
    # Four groups of one, two of two, and one of four on 4 processes.
    schedule = [phase | {"batch_rows": 8},
                phase | {"batch_rows": 2, "mix": {"whole": 1, 3: 1}},
                phase | {"batch_rows": 1, "mix": {"kept": 1}}]
    return options(files["model"], data, **({"schedule": schedule, "answer_weight": 0.3} | changes))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run_both_ways(rank: int, world: int, run: dict, out: Path) -> None:
    """As rows are dealt by their cost, and on two processes also as they come."""
    run_process(TrainOptions(**run), out / f"dealt-{world}", False)

    def in_turn(costs: list[int], kinds: list[bool], groups: int) -> list[tuple[int, ...]]:
        return [tuple(range(begin, begin + groups)) for begin in range(0, len(costs), groups)]

    if world == 2:
        with mock.patch.object(step, "deal", in_turn):
            run_process(TrainOptions(**run), out / "in-turn-2", False)


@pytest.fixture(scope="module")
def single(files: dict[str, Path]) -> Path:
    return train(mixed_run(files), files["directory"] / "single")


@pytest.mark.parametrize("world", [2, 4])
def test_the_run_is_the_same_on_every_number_of_processes_and_however_rows_are_dealt(
        world: int, files: dict[str, Path], single: Path):
    spawn(world, run_both_ways, mixed_run(files).model_dump(), files["directory"])
    want = metrics(single)
    ways = ["dealt-2", "in-turn-2"] if world == 2 else ["dealt-4"]
    for name in ways:
        got = metrics(files["directory"] / name)
        for key in KEYS:
            columns = [[line.get(key) or 0.0 for line in lines] for lines in (got, want)]
            torch.testing.assert_close(*map(torch.tensor, columns), rtol=1e-5, atol=0)
    uneven = [[line["attention_imbalance"] for line in metrics(files["directory"] / name)]
              for name in ways]
    assert [line["attention_imbalance"] for line in want] == [1.0] * 3
    assert uneven[0][2] == 1 and all(share >= 1 for share in uneven[0])
    assert world == 4 or 1 < uneven[0][0] < uneven[1][0]


def row_loss(models: dict[bool, torch.nn.Module], row: Row,
             totals: tuple[int, int]) -> torch.Tensor:
    """Share of a row: each document in a forward of its own, under the RoPE that it is to have."""
    loss = torch.zeros(())
    for begin, end in itertools.pairwise(row.cu_seqlens):
        ids, labels = torch.from_numpy(row.input_ids), torch.from_numpy(row.labels)
        logits = models[row.kind.native_rope](input_ids=ids[None, begin:end]).logits[0]
        targets = labels[begin + 1:end + 1]  # of a cut piece also the first token of the next
        if row.kind.distill:
            windows = row.cu_seqlens if row.windows is None else row.windows.cu_seqlens
            with torch.no_grad():
                taught = torch.cat([models[True](input_ids=ids[None, first:last]).logits[0]
                                    for first, last in itertools.pairwise(windows)
                                    if begin <= first < end])
            apart = F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), reduction="none",
                             log_target=True).sum(-1)[:len(targets)]
            loss = loss + apart[targets != IGNORE].sum() / totals[0]
            continue
        nll = F.cross_entropy(logits[:len(targets)], targets, reduction="none",
                              ignore_index=IGNORE)
        answers = torch.from_numpy(row.answers[begin + 1:end + 1])
        loss = loss + nll.sum() / totals[0] + 0.3 * nll[answers].sum() / totals[1]
    return loss


def test_each_document_is_read_as_transformers_read_it_with_its_rope(files: dict[str, Path],
                                                                     single: Path):
    run = mixed_run(files)
    rows = load_rows(run, AutoTokenizer.from_pretrained(run.model))
    models = {native: AutoModelForCausalLM.from_pretrained(
        run.model, config=AutoConfig.from_pretrained(run.model if native else single),
        attn_implementation="eager") for native in (True, False)}
    batch = [rows.row(0, index) for index in range(8)]
    assert len({row.kind for row in batch}) == 4
    totals = (sum(int((row.labels[1:] != IGNORE).sum()) for row in batch),
              sum(int(row.answers[1:].sum()) for row in batch))
    loss = sum(row_loss(models, row, totals) for row in batch)
    loss.backward()
    line = metrics(single)[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    pairs = zip(models[True].parameters(), models[False].parameters(), strict=True)
    norm = torch.stack([(a.grad + b.grad).norm() for a, b in pairs]).norm()
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    # And it is not what the phase's RoPE alone would give.
    assert abs(sum(row_loss({True: models[False], False: models[False]}, row, totals)
                   for row in batch).item() / loss.item() - 1) > 1e-4


def test_answers_weigh_as_much_beside_distilled_ones(files: dict[str, Path], tmp_path: Path):
    """Weighted means are over the answers that are learned; those of distilled rows are not."""
    data = [{"kind": "retrieval", "path": str(files["text"])},
            {"kind": "examples", "path": str(files["examples"]), "distill": True}]
    phase = {"length": LENGTH, "steps": 1, "lr": 1e-3, "batch_rows": 2, "rope": {"method": "ntk"}}
    lines = [metrics(train(mixed_run(files, data=data, schedule=[phase], answer_weight=weight),
                           tmp_path / str(weight)))[0] for weight in (0.0, 0.5)]
    added = lines[1]["loss"] - lines[0]["loss"]
    assert added == pytest.approx(0.5 * lines[0]["answer_nll"], rel=1e-5)
    row = load_rows(mixed_run(files, data=data[:1], schedule=[phase | {"batch_rows": 1}]),
                    AutoTokenizer.from_pretrained(files["model"])).row(0, 0)
    assert lines[0]["answer_nll"] > 1 and row.answers.sum() < 20


def test_what_serves_both_in_transformers(files: dict[str, Path], single: Path):
    """Two lists of divisors, as the documentation says: the native RoPE for short text, the trained
    one for a row that is longer than the native length."""
    own, trained = (AutoConfig.from_pretrained(path) for path in (files["model"], single))
    both = AutoConfig.from_pretrained(files["model"])
    models = [AutoModelForCausalLM.from_pretrained(single, config=config)
              for config in (own, trained)]
    native, long = (model.model.rotary_emb.inv_freq for model in models)
    assert (native / long).max() > 1.5
    both.max_position_embeddings = LENGTH
    both.rope_parameters = {
        "rope_type": "longrope", "rope_theta": own.rope_parameters["rope_theta"], "factor": 4.0,
        "short_factor": [1.0] * len(native), "long_factor": (native / long).tolist(),
        "original_max_position_embeddings": NATIVE_LEN, "attention_factor": 1.0}
    served = AutoModelForCausalLM.from_pretrained(single, config=both)
    for length, model in ((NATIVE_LEN, models[0]), (NATIVE_LEN + 1, models[1]), (8, models[0])):
        ids = torch.arange(length)[None]
        torch.testing.assert_close(served(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_cache_inside_the_data_is_refused(files: dict[str, Path], tmp_path: Path):
    data = files["text"].parent
    run = mixed_run(files, data=[{"kind": "text", "path": str(data)}],
                    schedule=[{"length": LENGTH, "steps": 1, "lr": 1e-3}],
                    token_cache=str(data / "tokens"))
    with pytest.raises(RecipeError, match="token_cache .* lies in the data"):
        train(run, tmp_path / "out")
    assert not (data / "tokens").exists()


@pytest.mark.parametrize(("source", "match"), [
    ({"kind": "text", "rope": "native", "document_length": 65}, "made for 64 tokens, but the "
                                                                "longest has 65; set document_"),
    ({"kind": "text", "rope": "native"}, "made for 64 tokens, but the longest has"),
    ({"kind": "text", "distill": True}, "distill reads documents with the teacher's own RoPE, "
                                        "which is made for 64 tokens, but the longest has"),
])
def test_documents_longer_than_the_native_length_are_refused(source: dict, match: str,
                                                             files: dict[str, Path],
                                                             tmp_path: Path):
    run = mixed_run(files, data=[source | {"path": str(files["text"])}],
                    schedule=[{"length": LENGTH, "steps": 1, "lr": 1e-3}])
    with pytest.raises(DataError, match=match):
        train(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())
