"""scripts/bench_eval_ring.py: the whole of it on two processes without a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as when the script itself is run

import bench_eval_ring as bench


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval-ring")
    assert bench.main(["--tiny", "--commit", "abc", "--new-tokens", "2", "--out", str(out)]) == 0
    return json.loads((out / "eval_ring.json").read_text()), (out / "table.md").read_text()


def test_one_gpu_and_all_of_them_are_timed_and_agree(found):
    result, _ = found
    assert (result["world"], result["length"], result["chunk"]) == (2, 512, 64)
    assert len(result["rounds"]) == 2
    for kind in ("one", "ring"):
        assert all(entry[kind]["seconds"] > 0 for entry in result["rounds"])
    assert 0 <= result["difference"] <= 1e-4
    assert 0 <= result["difference_fp32"] <= 1e-4
    assert list(result["floor"]["seconds_a_layer"]) == ["flash_cpu"]
    assert result["floor"]["seconds"] == 2 * result["floor"]["seconds_a_layer"]["flash_cpu"]


def test_quotients_are_of_the_best_rounds(found):
    result, _ = found
    one = min(entry["one"]["seconds"] for entry in result["rounds"])
    ring = min(entry["ring"]["seconds"] for entry in result["rounds"])
    assert result["speedup"] == one / ring
    assert result["one_over_floor"] == one / result["floor"]["seconds"]
    assert result["ring_over_floor"] == pytest.approx(2 * ring / result["floor"]["seconds"])


def test_the_table_says_where_it_comes_from(found):
    result, table = found
    for text in ("scripts/bench_eval_ring.py --tiny --commit abc", "commit abc", "2 x CPU",
                 f"torch {torch.__version__}", "| prefill, 2 GPUs |", "attention alone, flash_cpu",
                 f"{result['speedup']:.2f} x as fast as 1 GPU"):
        assert text in table


def test_rows_that_differ_fail_the_run(found):
    result, _ = found
    assert bench.verdict(result) is None
    for difference in (2e-4, float("nan")):
        for name in ("difference", "difference_fp32"):
            assert f"{name}: hidden" in bench.verdict({**result, name: difference})


def test_what_cannot_be_run_is_refused(capsys):
    for arguments, message in ((["--gpus", "1"], "at least 2"), (["--length", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            bench.parse(arguments)
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench.main(["--commit", "abc"]) == 2
        assert "torch sees 0 CUDA devices" in capsys.readouterr().err
