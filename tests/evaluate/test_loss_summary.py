import json

import pytest

from extend.evaluate import evaluate
from extend.evaluate.loss_summary import summarize_losses
from tests.evaluate.conftest import save_model


@pytest.fixture(scope="module")
def results(model_dir, text_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("losses")
    base = save_model(directory / "base", seed=1, max_position_embeddings=100)
    text = {"text": str(text_file)}
    path = evaluate(model_dir, directory / "eval", base=base, device="cpu", lengths=[64, 128],
                    trials=2, tasks=[
        {"task": "loss-by-position", **text, "first": 16, "native": 32},
        {"task": "sliding-perplexity", **text, "stride": 24},
        {"task": "key-tokens", **text, "short": 48, "stride": 16, "alpha": "0.2", "beta": 5,
         "evaluator": str(base)},
        {"task": "divergence", **text, "reference": str(base), "window": 96, "max_tokens": 400}])
    return json.loads(path.read_text())


def test_rows_of_every_measure_are_there(results):
    assert [(r["task"], r["length"], r["control"]) for r in results["rows"]] == [
        ("loss-by-position", 128, None), ("loss-by-position", 100, "base"),
        ("sliding-perplexity", 64, None), ("sliding-perplexity", 128, None),
        ("sliding-perplexity", 100, "base"), ("key-tokens", 64, None), ("key-tokens", 128, None),
        ("key-tokens", 100, "base"), ("divergence", 96, None)]
    assert all(r["depth"] is None and r["score"] is None and r["loss"] > 0 and r["n"] >= 2
               and len(r["prompt_sha256"]) == 64 for r in results["rows"])
    assert results["summary"]["tasks"] == results["summary"]["skills"] == {}


def test_the_summary_tells_lengths_and_controls_apart(results):
    summary, rows = results["summary"], results["rows"]
    assert list(summary["losses"]) == [
        "sliding-perplexity 64", "sliding-perplexity 128", "sliding-perplexity 100, base",
        "key-tokens 64", "key-tokens 128", "key-tokens 100, base"]
    assert [entry["loss"] for entry in summary["losses"].values()] == [
        row["loss"] for row in rows[2:8]]
    assert list(summary["curves"]) == ["loss-by-position", "loss-by-position, base"]
    curve = summary["curves"]["loss-by-position"]
    assert {key: rows[0][key] for key in curve} == curve
    assert {"curve", "slope_per_doubling", "slope_stderr", "verdict", "native"} <= curve.keys()
    assert {"loss", "reference_loss", "kl", "kl_stderr", "agreement"} <= \
        summary["divergences"]["divergence"].keys()


def test_rows_without_a_number_are_left_out():
    row = {"name": "x", "length": 64, "control": None, "score": None, "loss": None}
    assert summarize_losses([row, {**row, "score": 0.5}]) == {
        "losses": {}, "curves": {}, "divergences": {}}
