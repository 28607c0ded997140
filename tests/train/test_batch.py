"""Labels shifted on the whole row, weights over the whole step, parts that make up the row."""

import numpy as np
import pytest
import torch

from extend.errors import LayoutError
from extend.ring import LAYOUTS, unshard
from extend.train.batch import build_batch, shift, token_weights
from extend.train.data import IGNORE, Row


def example(length: int = 24, seed: int = 0, bounds: tuple[int, ...] = ()) -> Row:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 100, length)
    labels = np.where(rng.random(length) < 0.3, IGNORE, ids)
    answers = (rng.random(length) < 0.3) & (labels != IGNORE)
    return Row(ids, labels, answers, np.asarray([0, *bounds, length], dtype=np.int32), "test")


def test_shift_moves_labels_to_the_token_before():
    row = example()
    labels, answers = shift(row)
    np.testing.assert_array_equal(labels[:-1], row.labels[1:])
    np.testing.assert_array_equal(answers[:-1], row.answers[1:])
    assert labels[-1] == IGNORE and not answers[-1]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_make_up_the_shifted_rows(layout: str, world: int):
    rows = [example(seed=0), example(seed=1)]
    parts = [build_batch(rows, layout=layout, rank=rank, world=world) for rank in range(world)]
    for name, want in (
        ("input_ids", [row.input_ids for row in rows]),
        ("labels", [shift(row)[0] for row in rows]),
        ("answers", [shift(row)[1] for row in rows]),
        ("position_ids", [np.arange(24)] * 2),
    ):
        whole = unshard([getattr(part, name) for part in parts], 1, layout)
        torch.testing.assert_close(whole, torch.from_numpy(np.stack(want)))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_documents_become_one_row(layout: str, world: int):
    rows = [example(seed=0, bounds=(5, 6)), example(seed=1), example(seed=2, bounds=(20,))]
    parts = [build_batch(rows, layout=layout, rank=rank, world=world, document_mask=True)
             for rank in range(world)]
    bounds = (0, 5, 6, 24, 48, 68, 72)
    for part in parts:
        assert part.cu_seqlens == part.to(torch.device("cpu")).cu_seqlens == bounds
        assert part.documents(world) == [5, 1, 18, 24, 20, 4]
    for name, want in (
        ("input_ids", [row.input_ids for row in rows]),
        ("labels", [shift(row)[0] for row in rows]),
        ("answers", [shift(row)[1] for row in rows]),
        ("position_ids", [np.arange(24)] * 3),
    ):
        whole = unshard([getattr(part, name) for part in parts], 1, layout)
        torch.testing.assert_close(whole, torch.from_numpy(np.concatenate(want))[None])


@pytest.mark.parametrize(("bounds", "document_mask"), [((), True), ((5,), False)])
def test_other_rows_stay_rows(bounds: tuple[int, ...], document_mask: bool):
    rows = [example(seed=0, bounds=bounds), example(seed=1)]
    part = build_batch(rows, layout="zigzag", rank=1, world=2, document_mask=document_mask)
    assert part.cu_seqlens is None and part.input_ids.shape == (2, 12)
    assert part.documents(2) == [24, 24]


def test_weights_are_means_over_the_whole_step():
    parts = [build_batch([example(seed=s)], layout="zigzag", rank=r, world=2)
             for s in range(3) for r in range(2)]
    totals = torch.stack([part.counts() for part in parts]).sum(0)
    weights = [token_weights(part, totals, 0.25) for part in parts]
    losses = [torch.rand(part.labels.shape) for part in parts]
    got = sum((w * x).sum() for w, x in zip(weights, losses, strict=True))
    predicted = torch.cat([x[p.labels != IGNORE] for p, x in zip(parts, losses, strict=True)])
    answers = torch.cat([x[p.answers] for p, x in zip(parts, losses, strict=True)])
    assert totals.tolist() == [len(predicted), len(answers), 0]
    torch.testing.assert_close(got, predicted.mean() + 0.25 * answers.mean())


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(LayoutError, match="length 24 must be a multiple of"):
        build_batch([example()], layout="zigzag", rank=0, world=5)


def test_what_only_others_distill_the_teacher_reads_in_pieces():
    """Its part of the gathers is needed, its answer is not."""
    row, several = example(4096), [example(64), example(64, seed=1)]
    batch = build_batch([row], layout="zigzag", rank=1, world=2, document_mask=True,
                        reads_teacher=True)
    assert batch.cu_seqlens is None and batch.taught.cu_seqlens == (0, 1024, 2048, 3072, 4096)
    torch.testing.assert_close(batch.taught.position_ids, batch.position_ids % 1024)
    batch = build_batch(several, layout="zigzag", rank=1, world=2, document_mask=True,
                        reads_teacher=True)
    assert batch.cu_seqlens is None and batch.taught.cu_seqlens is None
    assert build_batch([row], layout="zigzag", rank=1, world=2).taught is None
