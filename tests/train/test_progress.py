"""metrics.jsonl and the line on the screen."""

import json
from pathlib import Path

import torch

from extend.train.progress import Progress, peak_flops, progress_line

RECORD = {"step": 7, "steps": 20, "phase": 2, "loss": 2.5, "nll": 2.25, "answer_nll": 0.5,
          "lr": 1e-4, "grad_norm": 0.75, "peak_memory_bytes": 3 * 2**30,
          "host_memory_bytes": 5 * 2**30}


def test_line_names_everything():
    line = progress_line(RECORD | {"tokens_per_second": 62400.0,
                                   "tokens_per_second_per_gpu": 7800.0, "mfu": 0.4321,
                                   "eta_seconds": 3723.2})
    assert line == ("step 7/20 | phase 2 | loss 2.5000 | nll 2.2500 | answers 0.5000 | lr 1.00e-04 "
                    "| grad 0.750 | 62,400 tok/s | 7,800 each | MFU 43.2% | 3.0 GiB | host 5.0 GiB "
                    "| ETA 1:02:04")


def test_a_divergence_is_named():
    rates = {"tokens_per_second": 1.0, "tokens_per_second_per_gpu": 1.0, "eta_seconds": 1.0}
    line = progress_line(RECORD | rates | {"divergence": 0.125})
    assert "| nll 2.2500 | divergence 0.1250 | answers 0.5000 |" in line


def test_resumed_file_has_one_line_per_step(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    old = [json.dumps({"step": s, "old": True}) + "\n" for s in (1, 2, 3)]
    file.write_text("".join(old) + '{"st')
    with Progress(file, step=2, total_tokens=400, done_tokens=200, world=4) as progress:
        progress.tell(dict(RECORD, step=3), tokens=100, flops=1e9, peak=1e12)
        progress.tell(dict(RECORD, step=4), tokens=100, flops=1e9, peak=None)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("old", False) for line in lines] == [True, True, False, False]
    assert [line["tokens"] for line in lines[2:]] == [300, 400]
    for line in lines[2:]:  # rounded to a tenth of a token
        assert abs(line["tokens_per_second_per_gpu"] - line["tokens_per_second"] / 4) <= 0.1
    assert lines[2]["mfu"] > 0 and "mfu" not in lines[3]
    assert lines[2]["eta_seconds"] >= 0 and lines[3]["eta_seconds"] == 0


def test_peak_of_the_cpu_is_not_known():
    assert peak_flops(torch.device("cpu")) is None
