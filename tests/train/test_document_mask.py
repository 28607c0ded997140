"""Documents that share a row: none sees another, wherever their positions begin."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from extend.errors import CompatibilityError
from extend.model_config import read_config
from extend.ring.hf_attention import RingSettings
from extend.train.batch import Batch, build_batch, token_weights
from extend.train.data import IGNORE, Row, load_rows
from extend.train.loop import run_process
from extend.train.model import CausalLoss, load_model
from extend.train.progress import Progress
from extend.train_options import TrainOptions
from tests.spawn import spawn
from tests.train.tiny import options, save_model, save_text

LENGTH = 48
BOUNDS = ((0, 11, 12, LENGTH), (0, 30, LENGTH), (0, LENGTH))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def load(model_dir: Path) -> CausalLoss:
    run = options(model_dir, [{"kind": "retrieval"}])
    return CausalLoss(load_model(run, read_config(model_dir)), chunk=20)


def make_rows() -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for bounds in BOUNDS:
        ids = rng.integers(0, 264, LENGTH)
        labels = ids.copy()
        labels[list(bounds[:-1])] = IGNORE
        answers = (rng.random(LENGTH) < 0.3) & (labels != IGNORE)
        rows.append(Row(ids, labels, answers, np.asarray(bounds, dtype=np.int32), "test"))
    return rows


def batch_of(rows: list[Row], *, document_mask: bool = False) -> Batch:
    return build_batch(rows, layout="contiguous", rank=0, world=1, document_mask=document_mask)


def losses(module: CausalLoss, batch: Batch, positions: Tensor | None = None) -> Tensor:
    """Every token's loss; the gradients of the whole loss go to the parameters."""
    module.zero_grad()
    ring = RingSettings(layout="contiguous", cu_seqlens=batch.cu_seqlens)
    loss, nll = module(batch.input_ids, batch.position_ids if positions is None else positions,
                       batch.labels, token_weights(batch, batch.counts(), 0.5), ring)
    loss.backward()
    return nll


def gradients(module: CausalLoss) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, gradient in want.items():  # fp32, sums in another order
        torch.testing.assert_close(got[name], gradient, rtol=1e-4,
                                   atol=1e-5 * gradient.abs().max().item())


def test_positions_may_restart_with_each_document(model_dir: Path):
    module, batch = load(model_dir), batch_of(make_rows(), document_mask=True)
    running = losses(module, batch)
    want = gradients(module)
    restarted = torch.cat([torch.arange(size) for size in batch.documents(1)])[None]
    assert (restarted != batch.position_ids).any()
    torch.testing.assert_close(losses(module, batch, restarted), running, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(module), want)


def test_rows_side_by_side_equal_each_document_alone(model_dir: Path):
    module, rows = load(model_dir), make_rows()
    batch = batch_of(rows, document_mask=True)
    nll = losses(module, batch)
    got = gradients(module)
    module.zero_grad()
    totals, alone = batch.counts(), []
    for row in rows:
        for begin, end in itertools.pairwise(row.cu_seqlens):
            document = batch_of([Row(row.input_ids[begin:end], row.labels[begin:end],
                                     row.answers[begin:end], np.asarray([0, end - begin]), "")])
            loss, own = module(document.input_ids, document.position_ids, document.labels,
                               token_weights(document, totals, 0.5),
                               RingSettings(layout="contiguous"))
            loss.backward()
            alone.append(own)
    torch.testing.assert_close(nll, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert_same_gradients(got, gradients(module))


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_changed_token_is_seen_in_its_own_document_only(document_mask: bool, model_dir: Path):
    module, rows = load(model_dir), make_rows()
    before = losses(module, batch_of(rows, document_mask=document_mask)).view(3, LENGTH)
    rows[0].input_ids[5] = (rows[0].input_ids[5] + 1) % 264
    after = losses(module, batch_of(rows, document_mask=document_mask)).view(3, LENGTH)
    changed = (after - before).abs() > 1e-5
    assert changed[0, 5:10].all()  # the eleventh token predicts nothing: its document ends
    assert changed[0, 12:LENGTH - 1].any() == (not document_mask)
    assert not changed[0, :5].any() and not changed[1:].any()


def flops_of_steps(rank: int, world: int, run: dict, out: Path) -> list[float]:
    """FLOPs that the main process tells of each step."""
    told, tell = [], Progress.tell

    def record(self: Progress, metrics: dict, **work: float) -> None:
        told.append(work["flops"])
        tell(self, metrics, **work)

    Progress.tell = record
    try:
        run_process(TrainOptions(**run), out / f"flops-{world}", False)
    finally:
        Progress.tell = tell
    return told


def test_flops_count_attention_inside_documents(model_dir: Path, tmp_path: Path):
    text = {"kind": "text", "path": str(save_text(tmp_path))}
    phases = [{"length": 128, "steps": 1, "batch_rows": rows, "lr": 1e-3} for rows in (2, 1)]
    run = options(model_dir, [text], schedule=phases).model_dump()
    masked = flops_of_steps(0, 1, run, tmp_path)
    torch.testing.assert_close(spawn(2, flops_of_steps, run, tmp_path)[0], masked, rtol=0, atol=0)
    whole = flops_of_steps(0, 1, run | {"document_mask": False}, tmp_path / "whole")
    rows = load_rows(TrainOptions(**run), AutoTokenizer.from_pretrained(model_dir))
    for i, indices in enumerate(([0, 1], [0])):
        unseen = sum(128**2 - int((np.diff(rows.row(i, j).cu_seqlens) ** 2).sum()) for j in indices)
        # Half of the squares, 12 FLOPs for each pair and channel, 32 channels, 2 layers.
        assert whole[i] - masked[i] == unseen / 2 * 12 * 32 * 2 > 0


def test_rows_of_documents_are_not_stacked(model_dir: Path):
    module, batch = load(model_dir), batch_of(make_rows())
    settings = RingSettings(cu_seqlens=BOUNDS[0])
    with pytest.raises(CompatibilityError, match="3 rows of packed documents"):
        module(batch.input_ids, batch.position_ids, batch.labels,
               torch.ones(batch.labels.shape), settings)
