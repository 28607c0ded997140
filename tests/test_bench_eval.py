"""The benchmark of evaluation runs, counts what it timed, and says what it did not time."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.evaluate.conftest import save_model

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = ["--tiny", "--longest", "1800", "--lengths", "2", "--depths", "2", "--prefill", "700",
         "--chunk", "300"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1" if name.startswith("RAYON") else "false")
    spec = importlib.util.spec_from_file_location("bench_eval", SCRIPTS / "bench_eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "eval_bench"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("bench") / "tiny")


def run(bench, model, out, *options):
    assert bench.main(["--model", str(model), "--out", str(out), *SMALL, *options]) == 0
    return json.loads((out / "bench.json").read_text()), (out / "table.md").read_text()


def test_every_section_gives_figures(bench, model, tmp_path):
    found, table = run(bench, model, tmp_path, "--sections", "grid,prefill,prompts,generate")
    grid = found["grid"]
    assert (grid["cells"], grid["cells_timed"], grid["cells_scaled"]) == (4, 4, False)
    assert grid["lengths"] == [900, 1800] and grid["depths"] == [0.0, 1.0]
    assert grid["ratio"] == pytest.approx(grid["cells_seconds"] / grid["stream_seconds"], abs=0.01)
    against = grid["against_one_forward"]
    assert against["same_answers"] == against["cells"] == 3
    assert against["largest_loss_difference"] < 1e-4  # fp32, losses of size 10
    assert found["prefill"]["parts"] == 3 and found["prefill"]["attention_floor_seconds"] > 0
    tasks = found["prompts"]["tasks"]
    for name in ("passkey", "passkey-text", "passkey-stream", "passkey-stream (text)"):
        assert tasks[name]["tokens"] == 700
    assert tasks["loss"] == {"left_out": "has no lengths"}
    assert found["generate"]["lengths"]["1800"]["new_tokens"] <= 2 * 64
    assert found["weights"] == "from the checkpoint"
    assert all(part in table for part in ("cell by cell / streamed", "prefill / attention"))


def test_a_limit_on_time_is_said(bench, model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found, table = run(bench, bare, tmp_path, "--sections", "grid", "--grid-seconds", "0")
    assert (found["grid"]["cells_timed"], found["grid"]["cells_scaled"]) == (2, True)
    assert "scaled from 2 cells" in table and found["weights"] == "random"
    assert "prefill" not in found


def test_an_unknown_section_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--sections", "grid,speed"])
    assert "no speed; choose of grid" in capsys.readouterr().err
