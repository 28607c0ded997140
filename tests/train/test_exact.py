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

PHASES = [{"length": 96, "steps": 1, "batch_rows": 6, "lr": 1e-3},
          {"length": 192, "steps": 1, "batch_rows": 1, "lr": 1e-3}]
BF16 = {"compute_dtype": "bfloat16"}
# By the number of processes; three of them divide no tensor evenly.
RUNS = {
    1: {"chunks": {"loss_chunk": 7},
        "plain-bf16": BF16,
        "chunks-bf16": {"loss_chunk": 7} | BF16,
        "host-bf16": {"host_memory": "1GiB", "recomputed_layers": 1} | BF16},
    3: {"striped": {"layout": "striped", "tile_tokens": 29, "recomputed_layers": 1}},
    4: {"shared": {"schedule": [PHASES[0] | {"context_parallel": 4}, PHASES[1]]},
        "contiguous": {"strategy": "all-gather", "layout": "contiguous"},
        "double-ring": {"strategy": "double-ring:2", "layout": "striped", "loss_chunk": 7},
        "usp-bf16": {"strategy": "usp:2", "host_memory": "1GiB", "tile_tokens": 29} | BF16},
}


def run_all(rank: int, world: int, runs: dict[str, dict], out: Path) -> None:
    """Whatever layers keep is moved about, and the six rows of a step are as many batches."""
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
    runs = {world: {name: options(model, data, answer_weight=0.4, **(
        {"schedule": PHASES} | changes)).model_dump() for name, changes in some.items()}
            for world, some in RUNS.items()}
    runs[1]["plain"] = options(model, data, answer_weight=0.4, schedule=PHASES).model_dump()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "_SMALLEST_BYTES", 1)
        patch.setattr(step_module, "_MICRO_TOKENS", 100)
        run_all(0, 1, runs.pop(1), out)
    for world, some in runs.items():
        spawn(world, run_all, some, out)
    return out


def losses(out: Path) -> torch.Tensor:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["loss"] for line in lines])


CASES = [(name, world) for world, runs in RUNS.items() for name in runs if name != "plain-bf16"]


@pytest.mark.parametrize(("name", "world"), [case for case in CASES if "bf16" not in case[0]])
def test_in_fp32_only_the_order_of_sums_differs(name: str, world: int, out: Path):
    found, plain = out / f"{name}-{world}", out / "plain-1"
    torch.testing.assert_close(losses(found), losses(plain), rtol=1e-5, atol=0)
    weights = load_file(found / "model.safetensors")
    for key, value in load_file(plain / "model.safetensors").items():
        # As in the tests of the loop: where a gradient is all rounding, Adam makes a step of it.
        torch.testing.assert_close(weights[key], value, rtol=1e-5,
                                   atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize(("name", "world"), [case for case in CASES if "bf16" in case[0]])
def test_bf16_differs_by_its_rounding(name: str, world: int, out: Path):
    """A mean over hundreds of tokens, each of whose logits is off by up to 2**-9 of itself."""
    found, plain = losses(out / f"{name}-{world}"), losses(out / "plain-bf16-1")
    torch.testing.assert_close(found, plain, rtol=2**-11, atol=0)
    # It is what bf16 itself differs by, against fp32.
    assert 2**-16 < float((plain / losses(out / "plain-1") - 1).abs().max()) < 2**-10


def test_memory_changes_no_bit_of_bf16(out: Path):
    plain = load_file(out / "plain-bf16-1" / "model.safetensors")
    found = load_file(out / "host-bf16-1" / "model.safetensors")
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
