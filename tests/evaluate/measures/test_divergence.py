import math
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from extend.errors import CheckpointError, CompatibilityError, DataError
from extend.evaluate.measures.divergence import compare
from extend.evaluate.tasks import TASKS
from extend.evaluate.tasks.task import Prompt
from extend.evaluate.tasks.vocabulary import check_ids
from tests.evaluate.conftest import make_model, save_model
from tests.evaluate.dense import dense_logits, mean_error, measure, open_backend
from tests.evaluate.test_forward import _Largest
from tests.tiny_text import make_tokenizer

# Logits of size 30 in fp32 against fp64: 30 x 6e-8 x a few, summed over the vocabulary.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def reference_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("reference") / "tiny", seed=1)


def task_of(text_file, reference, **options):
    return TASKS["divergence"](**{"text": str(text_file), "reference": str(reference),
                                  "window": 96, "max_tokens": 400, **options})


def oracle(model_dir, reference_dir, windows, width):
    """Means over each window's tokens of loss, reference's loss, KL and agreement: fp64 [4, n]."""
    found = []
    for ids in windows:
        own, theirs = (functional.log_softmax(
            dense_logits(path, ids, torch.float64)[:-1, :width], dim=-1)
            for path in (model_dir, reference_dir))
        wanted = torch.tensor(ids[1:])
        found.append([float(x.mean()) for x in (
            functional.nll_loss(own, wanted, reduction="none"),
            functional.nll_loss(theirs, wanted, reduction="none"),
            functional.kl_div(own, theirs, reduction="none", log_target=True).sum(-1),
            (own.argmax(-1) == theirs.argmax(-1)).double())])
    return np.array(found).T


def check(row, values):
    keys = [("loss", "stderr"), ("reference_loss", "reference_loss_stderr"), ("kl", "kl_stderr"),
            ("agreement", "agreement_stderr"), ("difference", "difference_stderr")]
    for (mean, error), line in zip(keys, [*values, values[0] - values[1]], strict=True):
        torch.testing.assert_close([row[mean], row[error]], list(map(float, mean_error(line))),
                                   **TOLERANCE)


@pytest.mark.parametrize(("chunk", "head_rows"), [(31, 512), (200, 7), (10_000, 40)])
def test_rows_are_those_of_all_logits_in_fp64(model_dir, reference_dir, text_file, monkeypatch,
                                              chunk, head_rows):
    monkeypatch.setattr(sys.modules[compare.__module__], "HEAD_ROWS", head_rows)
    (windows,), (row,) = measure(open_backend(model_dir, chunk),
                                 task_of(text_file, reference_dir))
    check(row, oracle(model_dir, reference_dir, windows, 400))
    assert (row["n"], row["tokens"], row["vocabulary"], row["score"]) == (4, 4 * 95, 400, None)
    assert row["kl"] > 0.1 and 0 <= row["agreement"] < 1


def test_a_model_does_not_differ_from_itself(model_dir, text_file):
    _, (row,) = measure(open_backend(model_dir), task_of(text_file, model_dir))
    assert (row["kl"], row["agreement"], row["difference"]) == (0.0, 1.0, 0.0)
    assert row["loss"] == row["reference_loss"]


def test_kl_to_a_guess_is_what_the_reference_knows(reference_dir, tmp_path, text_file):
    """KL(p || uniform) = log V - H(p): the direction is from the reference."""
    blank = make_model(tie_word_embeddings=False).requires_grad_(False)
    blank.lm_head.weight.zero_()
    blank.save_pretrained(tmp_path / "blank")
    make_tokenizer("bytes-bos").save_pretrained(tmp_path / "blank")
    (windows,), (row,) = measure(open_backend(tmp_path / "blank"),
                                 task_of(text_file, reference_dir))
    logs = [functional.log_softmax(dense_logits(reference_dir, ids, torch.float64)[:-1], dim=-1)
            for ids in windows]
    entropy = np.mean([float(-(x.exp() * x).sum(-1).mean()) for x in logs])
    assert row["kl"] == pytest.approx(math.log(400) - entropy, abs=1e-4)
    assert row["loss"] == pytest.approx(math.log(400), abs=2e-6)


def test_added_tokens_are_left_out(model_dir, tmp_path, text_file):
    save_model(tmp_path / "more", seed=1, vocab_size=410)
    tokenizer = make_tokenizer("bytes-bos")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "more")
    shared = len(make_tokenizer("bytes-bos"))
    for model, reference in ((model_dir, tmp_path / "more"), (tmp_path / "more", model_dir)):
        (windows,), (row,) = measure(open_backend(model), task_of(text_file, reference))
        check(row, oracle(model, reference, windows, shared))
        assert row["vocabulary"] == shared == 258
    with pytest.raises(DataError, match="holds the token 258, but r shares only ids below 258"):
        check_ids([Prompt([1, 258], 1)], 258, "r", "x")


def test_other_tokens_are_refused(model_dir, tmp_path, text_file):
    save_model(tmp_path / "x", seed=1)
    file = tmp_path / "x" / "tokenizer.json"
    file.write_text(file.read_text().replace('"z":', '"zz":', 1))
    with pytest.raises(CompatibilityError, match=r"id \d+ is 'z' for the model but 'zz' for"):
        measure(open_backend(model_dir), task_of(text_file, tmp_path / "x"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "x" / name).unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer to compare with"):
        measure(open_backend(model_dir), task_of(text_file, tmp_path / "x"))


def test_a_window_beyond_the_reference_is_refused(model_dir, tmp_path, text_file):
    short = save_model(tmp_path / "short", max_position_embeddings=64)
    with pytest.raises(DataError, match="window of 96 tokens is longer than the context of .* 64"):
        measure(open_backend(model_dir), task_of(text_file, short))


def test_all_logits_never_exist(model_dir, reference_dir, text_file, monkeypatch):
    monkeypatch.setattr(sys.modules[compare.__module__], "HEAD_ROWS", 16)
    backend = open_backend(model_dir)
    with _Largest() as seen:
        measure(backend, task_of(text_file, reference_dir, window=512, max_tokens=512))
    # Weights are 400 x 32; the MLP is the widest thing of a row, 48 channels a token.
    assert seen.elements <= 48 * 512 < 400 * 512
