import math
import sys

import numpy as np
import pytest
import torch

from extend.errors import DataError
from extend.evaluate.measures.sliding import slide
from extend.evaluate.tasks import TASKS
from tests.evaluate.dense import TOLERANCE, mean_error, measure, open_backend, plain_model
from tests.tiny_text import make_tokenizer


@pytest.fixture(params=["bytes-bos", "bytes"])
def backend(request, model_dir):
    found = open_backend(model_dir)
    found.tokenizer = make_tokenizer(request.param)
    return found


def yarn(model, ids, prefix, window, stride):
    """Each window's mean loss and targets, by labels of -100 as yarn's script sets them."""
    text, size, seen, found = ids[len(prefix):], window - len(prefix), 0, []
    for begin in range(0, len(text), stride):
        end = min(begin + size, len(text))
        row = torch.tensor([prefix + text[begin:end]])
        labels = row.clone()
        labels[:, :-(end - seen)] = -100
        with torch.no_grad():
            loss = model(row, labels=labels).loss
        found.append((float(loss), int((labels[:, 1:] != -100).sum())))
        seen = end
        if end == len(text):
            return found


@pytest.mark.parametrize(("stride", "group"), [(24, 2 ** 20), (50, 1)])
def test_both_means_are_those_of_yarns_loop(backend, model_dir, text_file, monkeypatch, stride,
                                            group):
    monkeypatch.setattr(sys.modules[slide.__module__], "_GROUP", group)
    task = TASKS["sliding-perplexity"](text=str(text_file), stride=stride, span=201)
    stretches, rows = measure(backend, task, [64, 201], 2)
    assert stretches[0] == stretches[1]  # every length scores the same text
    model = plain_model(model_dir)
    prefix = [backend.tokenizer.bos_token_id] * (len(backend.tokenizer("a")["input_ids"]) - 1)
    for length, row in zip([64, 201], rows, strict=True):
        windows = [yarn(model, ids, prefix, length, stride) for ids in stretches[0]]
        means = [mean for each in windows for mean, _ in each]
        counts = [sum(n for _, n in each) for each in windows]
        sums = [sum(mean * n for mean, n in each) for each in windows]
        loss, error = mean_error(np.array(sums) / counts)
        assert counts == [200, 200]  # every token but the very first, once
        assert (row["tokens"], row["windows"], row["n"]) == (400, len(means), 2)
        torch.testing.assert_close([row["loss"], row["stderr"]], [loss, error], **TOLERANCE)
        torch.testing.assert_close(
            [row["perplexity"], row["unweighted_perplexity"]],
            [math.exp(loss), math.exp(np.mean(means))], rtol=1e-4, atol=0.0)
        assert (row["length"], row["actual_length"], row["score"]) == (length, length, None)
    assert rows[0]["perplexity"] != pytest.approx(rows[0]["unweighted_perplexity"], rel=1e-3)


def test_windows_add_every_token_once():
    for total, size, stride in ((200, 63, 24), (63, 63, 24), (10, 63, 24), (64, 63, 63), (65, 9, 1),
                                (500, 100, 100)):
        windows = list(slide(total, size, stride))
        assert [t for _, end, new in windows for t in range(end - new, end)] == list(range(total))
        assert all(end - begin <= size for begin, end, _ in windows)
        # Between size - stride and size tokens are before every token of a later window.
        assert all(new <= stride and end - new - begin >= size - stride
                   for begin, end, new in windows[1:])


@pytest.mark.parametrize(("options", "lengths", "message"), [
    ({"span": 100, "stride": 32}, [64, 128], "128 tokens does not fit into a stretch of 100"),
    ({"stride": 64}, [64], "a window of 64 tokens that moves by 64 leaves tokens out"),
    ({}, [90_000], "too few for one window of 90000"),
])
def test_what_does_not_fit_is_refused(model_dir, text_file, options, lengths, message):
    task = TASKS["sliding-perplexity"](text=str(text_file), **options)
    with pytest.raises(DataError, match=message):
        measure(open_backend(model_dir), task, lengths, 1)


def test_a_stretch_is_as_long_as_the_longest_window(model_dir, text_file):
    task = TASKS["sliding-perplexity"](text=str(text_file), stride=30)
    stretches, rows = measure(open_backend(model_dir), task, [40, 96], 1)
    assert {len(ids) for each in stretches for ids in each} == {96}
    assert [(row["windows"], row["span"], row["stderr"]) for row in rows] == [
        (3, 96, None), (1, 96, None)]
