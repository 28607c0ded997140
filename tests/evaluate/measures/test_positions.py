import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from extend.errors import CompatibilityError, DataError
from extend.evaluate.frame import Frame
from extend.evaluate.measures import MEASURES
from extend.evaluate.measures.positions import bin_edges, describe_losses, native_length
from extend.evaluate.tasks import TASKS
from extend.evaluate.tasks.task import Prompt
from tests.evaluate.conftest import make_model
from tests.evaluate.dense import TOLERANCE, dense_losses, mean_error, measure, open_backend
from tests.tiny_text import make_text, make_tokenizer


@pytest.mark.parametrize("chunk", [37, 10_000])
def test_curve_is_that_of_all_logits(model_dir, text_file, chunk):
    task = TASKS["loss-by-position"](text=str(text_file), first=32, bins=2, native=100)
    (windows,), (row,) = measure(open_backend(model_dir, chunk), task, [64, 200], 3)
    losses = np.stack([dense_losses(model_dir, ids) for ids in windows])
    assert [*map(len, windows), row["length"], row["actual_length"]] == [200] * 5
    assert [(p["begin"], p["end"]) for p in row["curve"]] == [
        (1, 32), (32, 48), (48, 64), (64, 96), (96, 100), (100, 128), (128, 192), (192, 200)]
    for point in row["curve"]:  # the token at position p has column p - 1
        part = losses[:, point["begin"] - 1:point["end"] - 1]
        mean, error = mean_error(part.mean(axis=1))
        assert point["tokens"] == part.size
        torch.testing.assert_close([point["loss"], point["stderr"]], [mean, error], **TOLERANCE)
    x = np.log2(np.arange(100, 200))
    slopes = [np.polyfit(x, line[99:], 1)[0] for line in losses]
    mean, error = mean_error(slopes)
    torch.testing.assert_close([row["slope_per_doubling"], row["slope_stderr"]], [mean, error],
                               rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(row["loss"], losses.mean(), **TOLERANCE)
    assert (row["tokens"], row["n"], row["score"], row["joined"]) == (3 * 199, 3, None, True)
    assert row["stderr_from"] == "windows"


def test_a_model_without_preference_has_the_loss_of_a_guess(text_file, model_dir):
    backend = open_backend(model_dir)
    backend.model = make_model(tie_word_embeddings=False).requires_grad_(False)
    backend.model.lm_head.weight.zero_()
    backend.model.set_attn_implementation("extend_prefill")
    task = TASKS["loss-by-position"](text=str(text_file), native=64)
    _, (row,) = measure(backend, task, [512], 4)
    guess = pytest.approx(math.log(400), abs=2e-6)
    assert all(point["loss"] == guess for point in row["curve"])
    assert row["loss"] == guess and row["rises"] is False
    assert row["verdict"].startswith("beyond 64 tokens the loss does not rise beyond noise: +0.0")


@dataclass(frozen=True)
class WithPrefix:
    tokenizer: object
    prefix: tuple[int, ...]


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_excess_is_over_the_same_tokens_in_short_windows(prefix, model_dir, text_file):
    task = TASKS["loss-by-position"](text=str(text_file), first=32, bins=1, native=64, short=40)
    backend = open_backend(model_dir)
    frame = WithPrefix(backend.tokenizer, tuple(range(5, 5 + prefix)))
    cell = task.cells("loss", [200], [], 2)[0]
    (row,) = MEASURES["positions"](backend, frame, task, [cell], 0)
    excess = np.zeros((2, 199))
    for line, prompt in zip(excess, task.prompts(frame, cell, 0), strict=True):
        whole = dense_losses(model_dir, prompt.ids)
        for position in range(max(1, prefix), 200):
            # Read in the first window that holds it: 40 tokens with the prefix, moved by 20.
            moved = max(0, -(-(position + 1 - 40) // 20)) * 20
            window = [*prompt.ids[:prefix], *prompt.ids[prefix + moved:position + 1]]
            line[position - 1] = whole[position - 1] - dense_losses(model_dir, window)[-1]
    slope = np.polyfit(np.log2(np.arange(64, 200)), excess[:, 63:].T, 1)[0]
    torch.testing.assert_close(row["slope_per_doubling"], float(slope.mean()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(row["excess"], excess.mean(), **TOLERANCE)
    for point in row["curve"]:
        part = excess[:, point["begin"] - 1:point["end"] - 1]
        torch.testing.assert_close(point["excess"], part.mean(), **TOLERANCE)
        torch.testing.assert_close(point["loss"] - point["short_loss"], part.mean(), **TOLERANCE)
    assert "the loss over that in short windows" in row["verdict"]


@pytest.mark.parametrize("short", [1, 200, 300])
def test_short_windows_are_shorter_than_the_row(short, text_file, model_dir):
    task = TASKS["loss-by-position"](text=str(text_file), short=short)
    with pytest.raises(DataError, match=f"short is {short}, but windows have 200 tokens; give"):
        measure(open_backend(model_dir), task, [200], 1)


def losses_with_slope(slope, windows, length=8192, native=1024):
    rng = np.random.default_rng(0)
    rise = slope * np.maximum(0, np.log2(np.arange(1, length) / native))
    return 2 + rise + rng.normal(size=(windows, length - 1))


def test_verdicts():
    def told(slope, windows, native=1024):
        return describe_losses(losses_with_slope(slope, windows), first=256, bins=4, native=native)

    row = told(0.5, 4)
    assert row["rises"] is True and abs(row["slope_per_doubling"] - 0.5) < 4 * row["slope_stderr"]
    assert row["verdict"].startswith("beyond 1024 tokens the loss rises: +0.")
    assert told(-0.5, 4)["rises"] is False and "still falls: -0." in told(-0.5, 4)["verdict"]
    assert "does not rise beyond noise" in told(0.0, 4)["verdict"]
    alone = told(0.5, 1)
    assert alone["rises"] is True and "one window" in alone["verdict"]
    assert alone["stderr_from"] == "blocks of 512 tokens"
    inside = told(0.5, 4, native=8192)
    assert inside["rises"] is inside["slope_per_doubling"] is inside["slope_stderr"] is None
    assert inside["verdict"] == ("no tokens beyond the native length of 8192: the windows have "
                                 "8192")
    assert "too few tokens between 8000 and 8192" in told(0.5, 1, native=8000)["verdict"]


@pytest.mark.parametrize(("length", "first", "bins", "native"), [
    (1000, 64, 2, 300), (2, 256, 4, 8192), (300, 256, 4, 256), (97, 1, 3, 50), (4097, 256, 4, 7)])
def test_points_tile_the_positions(length, first, bins, native):
    edges = bin_edges(length, first, bins, native)
    assert [p for begin, end in edges for p in range(begin, end)] == list(range(1, length))
    assert not any(begin < native < end for begin, end in edges)
    whole = [end - begin for begin, end in edges if begin >= first and native <= first
             and 2 * begin < length]
    if first % bins == 0:  # equal parts of each doubling
        assert all(whole.count(size) >= bins for size in set(whole[:-1]))


def test_native_length_is_that_of_the_rope():
    def config(**rope):
        return SimpleNamespace(max_position_embeddings=4096, rope_parameters=rope)

    assert native_length(config(rope_type="yarn", original_max_position_embeddings=512)) == 512
    assert native_length(config(rope_type="default")) == 4096


def folder(path, *lines):
    for i, n in enumerate(lines):
        (path / f"{i}.txt").write_text(make_text(n, i))
    return str(path)


def test_windows_of_one_document_each(tmp_path):
    tokenizer = make_tokenizer("bytes-bos")
    text = folder(tmp_path, 2, 60, 3, 40)
    task = TASKS["loss-by-position"](text=text, join=False)
    cell, = task.cells("x", [300], (), 5)
    prompts = task.prompts(Frame.of(tokenizer), cell, 0)
    documents = [make_text(n, i) for i, n in enumerate((2, 60, 3, 40))]
    assert len({tuple(p.ids) for p in prompts}) == len(prompts) == 5
    for prompt in prompts:
        assert len(prompt.ids) == 300 and prompt.ids[0] == tokenizer.bos_token_id
        piece = tokenizer.decode(prompt.ids[1:])
        assert any(piece in document for document in documents)
    joined = TASKS["loss-by-position"](text=text).prompts(Frame.of(tokenizer), cell, 0)
    texts = "".join(documents)
    assert all(tokenizer.decode(p.ids[1:]) in texts for p in joined)
    assert any(not any(tokenizer.decode(p.ids[1:]) in d for d in documents) for p in joined)


@pytest.mark.parametrize(("options", "length", "message"), [
    ({}, 90_000, r"has \d+ tokens, too few for one window of 90000"),
    ({"join": False}, 2000, r"longest of its 2 documents has \d+ tokens, .* window of 2000"),
    ({}, 2, "a length of 2 does not hold"),
])
def test_what_does_not_fit_is_refused(tmp_path, options, length, message):
    task = TASKS["loss-by-position"](text=folder(tmp_path, 20, 30), **options)
    cell, = task.cells("x", [16, length] if length > 16 else [length], (), 1)
    assert cell.length == length
    with pytest.raises(DataError, match=message):
        task.prompts(Frame.of(make_tokenizer("bytes-bos")), cell, 0)


def test_backends_without_losses_are_refused(text_file):
    task = TASKS["loss-by-position"](text=str(text_file))
    server = SimpleNamespace(name="server", score=lambda prompts: [Prompt([], 0)])
    with pytest.raises(CompatibilityError, match="needs token_losses, model .* backend 'server'"):
        MEASURES["positions"](server, Frame.of(make_tokenizer("bytes")), task,
                              task.cells("x", [64], (), 1), 0)
