"""How many threads work on an extraction, and what of the files they leave in memory."""

import json
import subprocess
import sys

import pytest
import torch

from extend.adapter.workers import spread
from extend.delta.parallel import side_by_side

_CODE = """
import json, sys
from pathlib import Path

import torch
from extend.adapter import extract

def mapped():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

torch.set_num_threads(1)
torch.linalg.eigh(torch.eye(4).double())  # libraries are files too
before = mapped()
extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=2)
print(json.dumps([before, mapped()]))
"""


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("elements, workers, threads", [
    (64 * 64, 4, 1), (2**31 // 20 // 2, 2, 2), (2**31, 1, 4)])
def test_a_cpu_works_on_as_many_matrices_as_fit(four_threads, elements, workers, threads):
    assert spread(["cpu"], elements) == (["cpu"] * workers, threads)


def test_the_threads_of_a_matrix_do_not_depend_on_the_number_of_workers(four_threads):
    """Nor do the last bits of its factors, then."""
    assert spread(["cpu"] * 3, 64 * 64) == (["cpu"] * 3, 1)


def test_a_gpu_gets_two_workers(four_threads):
    assert spread(["cuda:0", "cuda:1"], 2**40) == (["cuda:0", "cuda:1"] * 2, 2)
    assert spread(["cuda:0", "cuda:0", "cuda:1"], 8) == (["cuda:0", "cuda:0", "cuda:1"], 2)


def test_side_by_side_keeps_order_and_threads(four_threads):
    assert side_by_side(lambda x: (x, torch.get_num_threads()), range(9)) == [
        (x, 1) for x in range(9)]
    assert torch.get_num_threads() == 4


def test_nothing_of_a_model_stays_mapped(llama, tmp_path):
    """A mapped file that was read counts as memory of the process."""
    rows = 2**17  # 32 MiB each of embedding and head
    for source, out in ((llama.base, tmp_path / "base"), (llama.tuned, tmp_path / "tuned")):
        _widen(source, out, rows)
    result = subprocess.run(
        [sys.executable, "-c", _CODE, str(tmp_path / "base"), str(tmp_path / "tuned"),
         str(tmp_path / "adapter")], capture_output=True, text=True, check=True)
    before, after = json.loads(result.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    assert size > 2**26
    assert after - before < 2**24


def _widen(source, out, rows):
    """The model with many more tokens."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name or "lm_head" in name:
            tensors[name] = torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
