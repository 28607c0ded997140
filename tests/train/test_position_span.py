"""Rows whose positions skip: where they lie, who reads them, and what a model makes of them."""

import random

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, LlamaForCausalLM

from extend.model_config import read_config
from extend.ring import unshard
from extend.ring.hf_attention import RingSettings, register_ring_attention
from extend.train.batch import build_batch, token_weights
from extend.train.data import load_rows, skip_positions
from extend.train.export import made_for
from extend.train.model import CausalLoss
from extend.train.session import rope_stages
from extend.train_options import Phase, TrainOptions
from tests.train.tiny import save_model, save_text

LENGTH, SPAN = 64, 1024


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("span") / "model")


@pytest.fixture(scope="module")
def options(model_dir):
    text = save_text(model_dir.parent / "text")
    return TrainOptions(
        model=str(model_dir), rope={"method": "ntk"}, data=[{"kind": "text", "path": str(text)}],
        schedule=[{"length": LENGTH, "steps": 3, "batch_rows": 2, "lr": 1e-3,
                   "position_span": SPAN, "position_pieces": 4}])


@pytest.fixture(scope="module")
def rows(options):
    return load_rows(options, AutoTokenizer.from_pretrained(options.model))


@pytest.mark.parametrize("pieces", [2, 5, LENGTH])
def test_positions_rise_and_skip_between_pieces(pieces):
    rng = random.Random(0)
    furthest, cuts = [], set()
    for _ in range(400):
        found = skip_positions(LENGTH, SPAN, pieces, rng)
        steps = np.diff(found)
        assert found[0] == 0 and found[-1] < SPAN and steps.min() >= 1
        assert (steps > 1).sum() <= pieces - 1
        furthest.append(found[-1])
        cuts |= set(np.flatnonzero(steps > 1).tolist())
    # The last of n shifts drawn evenly from 0 to 960 is 960 n / (n + 1) on average; its deviation
    # over 400 rows is at most 14.
    count = pieces - 1
    assert np.mean(furthest) == pytest.approx(LENGTH - 1 + 960 * count / (count + 1), abs=60)
    assert cuts == set(range(LENGTH - 1))  # everywhere


def test_rows_are_the_same_but_for_their_positions(options, rows):
    plain = options.model_copy(update={"schedule": [
        Phase(length=LENGTH, steps=3, batch_rows=2, lr=1e-3)]})
    others = load_rows(plain, AutoTokenizer.from_pretrained(options.model))
    drawn = [rows.row(0, index).positions.tolist() for index in range(6)]
    assert drawn == [rows.row(0, index).positions.tolist() for index in range(6)]
    assert len(set(map(tuple, drawn))) == 6
    for index in range(6):
        ours, theirs = rows.row(0, index), others.row(0, index)
        np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        assert theirs.positions is None


@pytest.mark.parametrize("document_mask", [True, False])
def test_every_rank_holds_its_part_of_the_positions(rows, document_mask):
    picked = [rows.row(0, index) for index in range(2)]
    parts = [build_batch(picked, layout="zigzag", rank=rank, world=2, document_mask=document_mask)
             for rank in range(2)]
    whole = unshard([part.position_ids for part in parts], 1, "zigzag")
    expected = np.concatenate([row.positions for row in picked])
    np.testing.assert_array_equal(whole.flatten().numpy(), expected)


def test_rows_with_the_native_rope_do_not_skip(options):
    data = [{**options.data[0].model_dump(), "rope": "native", "document_length": 32}]
    native = TrainOptions(**{**options.model_dump(exclude_unset=True), "data": data})
    found = load_rows(native, AutoTokenizer.from_pretrained(options.model))
    assert found.row(0, 0).kind.native_rope and found.row(0, 0).positions is None


def test_the_loss_is_that_of_transformers_at_these_positions(model_dir, rows):
    row = rows.row(0, 0)
    batch = build_batch([row], layout="zigzag", rank=0, world=1)
    weights = token_weights(batch, batch.counts(), 0.0)
    ours = LlamaForCausalLM.from_pretrained(model_dir,
                                            attn_implementation=register_ring_attention())
    loss, _ = CausalLoss(ours, 16)(batch.input_ids, batch.position_ids, batch.labels, weights,
                                   RingSettings())
    oracle = LlamaForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    with torch.no_grad():  # with a mask: without one it takes a skip for a new document
        logits = oracle(batch.input_ids, position_ids=batch.position_ids,
                        attention_mask=torch.ones_like(batch.input_ids)).logits
    expected = torch.nn.functional.cross_entropy(logits[0], batch.labels[0])
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    plain = torch.arange(LENGTH)[None]
    other, _ = CausalLoss(ours, 16)(batch.input_ids, plain, batch.labels, weights, RingSettings())
    assert abs(other - loss) > 1e-3


def test_the_rope_is_made_for_the_span(options, model_dir):
    config = read_config(model_dir)
    (stage,) = rope_stages(options, config.rope)
    assert stage.target_len == SPAN
    assert made_for(options.schedule, config) == SPAN


@pytest.mark.parametrize("changes,told", [
    ({"position_span": 64}, "position_span is 64, but rows have 64 tokens"),
    ({"position_pieces": 3}, "there is no position_span"),
    ({"position_span": 128, "position_pieces": 65}, "position_pieces is 65, but rows have 64"),
    ({"position_span": 256, "rope_to": 128}, "rope_to is 128 but positions reach 256")])
def test_what_does_not_fit_is_told(changes, told):
    with pytest.raises(ValidationError, match=told):
        Phase(length=64, steps=1, lr=1e-3, **changes)
