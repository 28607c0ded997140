"""Layouts, strategies, numbers of processes, chunks and memory change how a run is computed, and
not what: fp32 to the order of sums, bf16 to its rounding.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from extend.train import step as step_module
from extend.train.loop import run_process
from extend.train.memory import store as store_module
from extend.train_options import TrainOptions
from tests.spawn import spawn
from tests.train.tiny import options, save_examples, save_model, save_text

# Six rows a step, computed in batches of some; three processes divide no tensor evenly.
ALONE = {
    "chunks": {"loss_chunk": 7},
    "layers": {"recomputed_layers": 1, "host_memory": "1GiB"},
    "tiles": {"tile_tokens": 29},  # the last one has an odd rest
}
TOGETHER = {
    3: {"ring": {"strategy": "ring", "layout": "striped", "tile_tokens": 29},
        "three": {"recomputed_layers": 1, "host_memory": "1GiB", "loss_chunk": 7}},
    4: {"all-gather": {"strategy": "all-gather", "layout": "contiguous"},
        "ulysses": {"strategy": "ulysses", "layout": "striped", "kept_attention": 1},
        "usp": {"strategy": "usp:2", "host_memory": "1GiB"},
        "double": {"strategy": "double-ring:2", "layout": "striped", "tile_tokens": 29}},
}
BF16 = {"autocast": "bfloat16"}


def run_all(rank: int, world: int, runs: dict[str, dict], out: Path) -> None:
    store_module._SMALLEST_BYTES, step_module._MICRO_TOKENS = 1, 100
    for name, settings in runs.items():
        run_process(TrainOptions(**settings), out / f"{name}-{world}", False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of all runs, each under its name and the number of its processes."""
    out = tmp_path_factory.mktemp("exact")
    model = save_model(out / "model")
    data = [{"kind": "text", "path": str(save_text(out))},
            {"kind": "examples", "path": str(save_examples(out))}]

    def runs(changes: dict[str, dict]) -> dict[str, dict]:
        phases = [{"length": 96, "steps": 1, "batch_rows": 6, "lr": 1e-3},
                  {"length": 192, "steps": 2, "batch_rows": 1, "lr": 1e-3}]
        return {name + kind: options(model, data, answer_weight=0.4, schedule=phases,
                                     **(some | autocast)).model_dump()
                for name, some in changes.items() for kind, autocast in
                (("", {}), ("-bf16", BF16))}

    before = store_module._SMALLEST_BYTES, step_module._MICRO_TOKENS
    run_all(0, 1, runs({"plain": {}} | ALONE), out)
    store_module._SMALLEST_BYTES, step_module._MICRO_TOKENS = before
    for world, changes in TOGETHER.items():
        spawn(world, run_all, runs(changes), out)
    return out


def losses(out: Path) -> torch.Tensor:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["loss"] for line in lines])


CASES = [*((name, 1) for name in ALONE),
         *((name, world) for world, runs in TOGETHER.items() for name in runs)]


@pytest.mark.parametrize(("name", "world"), CASES)
def test_in_fp32_only_the_order_of_sums_differs(name: str, world: int, out: Path):
    found, plain = out / f"{name}-{world}", out / "plain-1"
    torch.testing.assert_close(losses(found), losses(plain), rtol=1e-5, atol=0)
    weights = load_file(found / "model.safetensors")
    for key, value in load_file(plain / "model.safetensors").items():
        # As in the tests of the loop: where a gradient is all rounding, Adam makes a step of it.
        torch.testing.assert_close(weights[key], value, rtol=1e-5,
                                   atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize(("name", "world"), CASES)
def test_bf16_differs_by_its_rounding(name: str, world: int, out: Path):
    """A loss of a few hundred tokens, each of whose logits is off by up to 2**-9 of itself."""
    found, plain = losses(out / f"{name}-bf16-{world}"), losses(out / "plain-bf16-1")
    torch.testing.assert_close(found, plain, rtol=2**-9, atol=0)
    # bf16 itself, against fp32, is as far off; so the bound is not one that nothing could miss.
    assert 2**-16 < float((plain / losses(out / "plain-1") - 1).abs().max()) < 2**-8


def test_memory_changes_no_bit_of_bf16(out: Path):
    plain = load_file(out / "plain-bf16-1" / "model.safetensors")
    found = load_file(out / "layers-bf16-1" / "model.safetensors")
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
