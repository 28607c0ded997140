import math

import numpy as np
import pytest
import torch

from extend.errors import CompatibilityError, DataError, RecipeError
from extend.evaluate.cells import describe
from extend.evaluate.measures.sliding import slide
from extend.evaluate.tasks import TASKS
from tests.evaluate.conftest import save_model
from tests.evaluate.dense import TOLERANCE, dense_losses, measure, open_backend

SHORT, STRIDE, ALPHA, BETA = 48, 16, 0.2, 5.0


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "tiny", seed=1,
                      max_position_embeddings=100)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("other") / "tiny", seed=2)


def windowed(directory, ids, size):
    """The loss of each token of the text, from the first window that holds it."""
    text, found = ids[1:], []
    for begin, end, new in slide(len(text), size - 1, STRIDE):
        found.append(dense_losses(directory, ids[:1] + text[begin:end])[-new:])
    return np.concatenate(found)


def oracle(model_dir, evaluator_dir, windows, context):
    """Sums and counts over key tokens, window by window."""
    sums, counts = [], []
    for ids in windows:
        long = windowed(evaluator_dir, ids, context)
        key = (windowed(evaluator_dir, ids, SHORT) - long > ALPHA) & (long < BETA)
        assert not key[:SHORT - 1].any()  # what the short window sees whole gains nothing
        sums.append(dense_losses(model_dir, ids)[key].sum())
        counts.append(key.sum())
    return np.array(sums), np.array(counts)


def task_of(text_file, **options):
    return TASKS["key-tokens"](**{"text": str(text_file), "alpha": ALPHA, "beta": BETA,
                                  "short": SHORT, "stride": STRIDE, **options})


@pytest.mark.parametrize(("evaluator", "chunk"), [("self", 10_000), ("base", 90)])
def test_key_tokens_are_those_of_all_logits(model_dir, base_dir, text_file, evaluator, chunk):
    path, context = (model_dir, 200) if evaluator == "self" else (base_dir, 100)
    task = task_of(text_file, evaluator="self" if evaluator == "self" else str(path))
    (windows,), (row,) = measure(open_backend(model_dir, chunk), task, [200], 3)
    sums, counts = oracle(model_dir, path, windows, context)
    loss = sums.sum() / counts.sum()
    rest = sums - loss * counts
    error = math.sqrt(3 / 2 * (rest ** 2).sum()) / counts.sum()
    assert 10 < counts.sum() < 300  # some, not all
    assert (row["key_tokens"], row["tokens"], row["of_tokens"]) == (*[counts.sum()] * 2, 3 * 199)
    torch.testing.assert_close([row["loss"], row["stderr"]], [loss, error], **TOLERANCE)
    torch.testing.assert_close(row["perplexity"], math.exp(loss), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(row["all_loss"], np.mean([dense_losses(model_dir, ids)
                                                         for ids in windows]), **TOLERANCE)
    assert row["evaluator_context"] == context


def test_models_with_one_evaluator_are_scored_on_the_same_tokens(model_dir, other_dir, base_dir,
                                                                 text_file):
    rows = {}
    for evaluator in ("self", str(base_dir)):
        for model in (model_dir, other_dir):
            _, (rows[evaluator, model],) = measure(
                open_backend(model), task_of(text_file, evaluator=evaluator), [120], 2)
    by_base = [rows[str(base_dir), model] for model in (model_dir, other_dir)]
    assert by_base[0]["key_sha256"] == by_base[1]["key_sha256"]
    assert by_base[0]["loss"] != by_base[1]["loss"]
    assert len({row["key_sha256"] for row in rows.values()}) == 3


def test_no_key_token_is_no_loss(model_dir, text_file):
    _, (row,) = measure(open_backend(model_dir), task_of(text_file, alpha=1000.0), [120], 2)
    assert row["loss"] is row["stderr"] is row["perplexity"] is row["score"] is None
    assert (row["key_tokens"], row["of_tokens"]) == (0, 2 * 119)
    assert describe(row) == "x: no score"


def test_what_does_not_fit_is_refused(model_dir, base_dir, text_file, tmp_path):
    backend = open_backend(model_dir)
    with pytest.raises(DataError, match="context of 48 tokens is no longer than short, 48"):
        measure(backend, task_of(text_file), [48], 1)
    with pytest.raises(DataError, match="context of 100 tokens is no longer than short, 128"):
        measure(backend, task_of(text_file, evaluator=str(base_dir), short=128), [200], 1)
    with pytest.raises(RecipeError, match="stride 64 must be less than short, which is 48"):
        task_of(text_file, stride=64)
    save_model(tmp_path / "x", seed=1)
    file = tmp_path / "x" / "tokenizer.json"
    file.write_text(file.read_text().replace('"z":', '"zz":', 1))
    with pytest.raises(CompatibilityError, match=r"id \d+ is 'z' for the model but 'zz' for"):
        measure(backend, task_of(text_file, evaluator=str(tmp_path / "x")), [120], 1)
