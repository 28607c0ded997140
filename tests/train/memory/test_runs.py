"""What layers keep, and where, does not change what a run computes; on one process and on two."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from extend.ring.strategies import ring as ring_module
from extend.ring.strategies import ulysses as ulysses_module
from extend.train.loop import run_process, train
from extend.train.memory import store as store_module
from extend.train_options import TrainOptions
from tests.spawn import spawn
from tests.train.tiny import options, save_model, save_text

MEMORY = {
    "whole": {"recomputed_layers": 0},
    "last": {"recomputed_layers": 1},
    "recompute": {"kept_attention": 0},
    "kept": {"kept_attention": "all"},
    "first": {"kept_attention": 1},
    "host": {"host_memory": "1GiB"},
    "budget": {"host_memory": 40_000},
    "tiled": {"tile_tokens": 24, "host_memory": "1GiB"},
    "fp8": {"kept_form": "fp8", "host_memory": "1GiB"},
}
EXACT = ("kept", "first", "host", "budget")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("memory")
    return {"directory": directory, "model": save_model(directory / "model"),
            "text": save_text(directory)}


def run_of(files: dict[str, Path], **changes: object) -> TrainOptions:
    phase = {"length": 128, "steps": 3, "lr": 1e-3, "rope": {"method": "ntk"}}
    return options(files["model"], [{"kind": "text", "path": str(files["text"])}],
                   schedule=[phase], **changes)


def run_all(rank: int, world: int, runs: dict[str, dict], out: Path, world_name: str) -> None:
    store_module._SMALLEST_BYTES = 1
    for name, settings in runs.items():
        run_process(TrainOptions(**settings), out / f"{name}-{world_name}", False)


@pytest.fixture(scope="module")
def outputs(files: dict[str, Path]) -> Path:
    runs = {name: run_of(files, **changes).model_dump() for name, changes in MEMORY.items()}
    run_all(0, 1, runs, files["directory"], "1")
    two = {f"{name}-{strategy}": {**runs[name], "strategy": strategy}
           for name in ("recompute", "kept", "host", "tiled") for strategy in ("ring", "ulysses")}
    spawn(2, run_all, two, files["directory"], "2")
    return files["directory"]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", EXACT)
def test_where_tensors_wait_changes_no_bit(name: str, outputs: Path):
    expected, found = weights(outputs / "recompute-1"), weights(outputs / f"{name}-1")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    assert losses(outputs / f"{name}-1") == losses(outputs / "recompute-1")


@pytest.mark.parametrize("name", ["recompute", "last", "tiled"])
def test_computing_again_and_in_tiles_is_as_good(name: str, outputs: Path):
    """fp32 sums in another order; see `assert_close_weights` of the loop's tests."""
    assert losses(outputs / f"{name}-1") == pytest.approx(losses(outputs / "whole-1"), rel=1e-5)
    for key, value in weights(outputs / "whole-1").items():
        torch.testing.assert_close(weights(outputs / f"{name}-1")[key], value, rtol=1e-5,
                                   atol=1e-5 * float(value.abs().max()))


def test_eight_bits_change_losses_little(outputs: Path):
    """Forward passes are exact: the first loss is the same, later ones follow other gradients."""
    found, expected = losses(outputs / "fp8-1"), losses(outputs / "recompute-1")
    assert found[0] == expected[0] and found != expected
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize("name", ["recompute", "kept", "host", "tiled"])
def test_two_processes_compute_what_one_does(name: str, strategy: str, outputs: Path):
    assert losses(outputs / f"{name}-{strategy}-2") == pytest.approx(
        losses(outputs / "recompute-1"), rel=1e-5)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_two_processes_keep_every_bit(strategy: str, outputs: Path):
    for name in ("kept", "host"):
        found = weights(outputs / f"{name}-{strategy}-2")
        for key, value in weights(outputs / f"recompute-{strategy}-2").items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(("kept", "runs"), [(0, 4), (1, 3), ("all", 2)])
def test_kept_attention_is_computed_once(kept: int | str, runs: int, files: dict[str, Path],
                                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: Counter[str] = Counter()
    forward = ring_module.Ring.forward

    def count(self, q, k, v):
        calls["forward"] += 1
        return forward(self, q, k, v)

    monkeypatch.setattr(ring_module.Ring, "forward", count)
    settings = run_of(files, kept_attention=kept, strategy="ring").model_dump()
    settings["schedule"][0]["steps"] = 1
    train(TrainOptions(**settings), tmp_path / "out")
    assert calls["forward"] == runs  # two layers
    assert ulysses_module.Ulysses.resume is not None
