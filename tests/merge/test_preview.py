"""A dry run: every problem at once, from headers and configs, and nothing written."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from extend.adapter_format.peft_files import TensorFile
from extend.checkpoint import Checkpoint
from extend.cli import main
from extend.errors import CompatibilityError
from extend.merge import merge, preview
from tests.adapter_format.tiny_models import LONG, build, edit_json, save


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    def refuse(self, name):
        raise AssertionError(f"{name} was read")
    monkeypatch.setattr(Checkpoint, "read", refuse)
    monkeypatch.setattr(TensorFile, "read", refuse)


def test_announces_what_the_merge_writes(case, tmp_path, monkeypatch):
    found = preview(case.adapter, case.models.target, tmp_path / "new" / "out", dtype="float32")
    assert found.problems == ()
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    out = merge(case.adapter, case.models.target, tmp_path / "out", dtype="float32")
    written = Checkpoint(out)
    assert {info.name: info for info in found.tensors} == written.infos
    assert found.num_bytes == written.num_bytes
    results = json.loads((out / "manifest.json").read_text())["results"]
    assert (found.modules, found.sidecar_tensors) == (
        results["modules"], results["sidecar_tensors"])
    assert list(found.dropped_buffers) == results["dropped_buffers"] == []
    assert found.change.max_position_embeddings_after == LONG


@pytest.mark.parametrize(("options", "counts"), [
    ({}, (14, 7)), ({"sidecar": False}, (14, 0)), ({"weight": 0}, (0, 0))])
def test_counts_follow_the_options(llama, tmp_path, options, counts):
    found = preview(llama.adapter, llama.models.target, tmp_path / "out", **options)
    assert (found.modules, found.sidecar_tensors) == counts


def test_stored_copy_of_a_tied_head_is_not_compared(tied, tmp_path):
    target = Path(shutil.copytree(tied.models.target, tmp_path / "target"))
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
              target / "model.safetensors", metadata={"format": "pt"})
    found = preview(tied.adapter, target, tmp_path / "out")
    assert found.problems == ()
    assert len(found.tensors) == len(tensors) + 1


def broken(tmp_path: Path) -> Path:
    """A target with another vocabulary, other heads, another RoPE and integers for a weight."""
    target = save(build("llama", vocab_size=100, num_key_value_heads=4, rope_parameters={
        "rope_type": "default", "rope_theta": 5e5}), tmp_path / "target", torch.float32)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_every_problem_at_once(llama, tmp_path, monkeypatch):
    target = broken(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    usage = SimpleNamespace(total=100, used=90, free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = preview(llama.adapter, target, out, weight=float("nan"), dtype="int3",
                    rope_from=llama.models.tuned)
    for part in ("weight is nan", "int3", "has a sidecar", "num_kv_heads is 2",
                 "layers.0.self_attn.k_proj.weight: shape [32, 64]", "RoPE rope_theta is 10000.0",
                 "tensor model.norm.weight is I8", "exists already", "only 10 bytes are free"):
        assert [part in problem for problem in found.problems].count(True) == 1, part
    with pytest.raises(CompatibilityError, match=rf"the merge has {len(found.problems)} problems"):
        found.raise_if_any()
    assert (out / "file").read_text() == "old"


def test_quantized_target_does_not_hide_the_rest(llama, target, tmp_path):
    edit_json(target / "config.json", quantization_config={"quant_method": "awq"})
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    first, second = preview(llama.adapter, target, tmp_path / "out").problems
    assert "quantized (awq)" in first
    assert "tensor model.norm.weight is I8" in second


def test_adapter_and_target_that_are_not_there(tmp_path):
    found = preview(tmp_path / "a", tmp_path / "t", tmp_path / "out")
    assert [str(tmp_path / "a") in p for p in found.problems] == [True, False, False]
    assert found.tensors == ()


def test_plain_adapter_whose_modules_do_not_match(llama, adapter, tmp_path):
    (adapter / "extend_sidecar.json").unlink()
    file = adapter / "adapter_model.safetensors"
    save_file({k.replace("layers.1", "layers.7"): v for k, v in load_file(file).items()}, file)
    found = preview(adapter, llama.models.target, tmp_path / "out")
    assert "--rope-from" in found.problems[0]
    assert len(found.problems) == 8
    assert all("the target holds no model.layers.7." in p for p in found.problems[1:])


def test_dry_run_of_merge(llama, tmp_path):
    out = merge(llama.adapter, llama.models.target, tmp_path / "out", dry_run=True)
    assert out == tmp_path / "out"
    assert not list(tmp_path.iterdir())
    with pytest.raises(CompatibilityError, match="the merge has 1 problem:\n  1. weight is inf"):
        merge(llama.adapter, llama.models.target, out, weight=float("inf"), dry_run=True)


def test_command_line(llama, tmp_path):
    arguments = ["merge", "--adapter", str(llama.adapter), "--out", str(tmp_path / "out"),
                 "--dry-run", "-q", "--target"]
    done = CliRunner().invoke(main, [*arguments, str(llama.models.target)])
    assert done.exit_code == 0, done.output
    assert "14 with a LoRA product and 7 with a sidecar delta" in done.stdout
    done = CliRunner().invoke(main, [*arguments, str(llama.models.target), "--json"])
    assert json.loads(done.stdout)["modules"] == 14
    done = CliRunner().invoke(main, [*arguments, str(broken(tmp_path))])
    assert done.exit_code == 1
    assert "num_kv_heads is 2" in done.stderr and "rope_theta is 10000.0" in done.stderr
    assert not (tmp_path / "out").exists()
