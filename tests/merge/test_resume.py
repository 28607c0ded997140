"""An interrupted merge goes on from its finished shards, and from nothing else."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from extend.checkpoint import Checkpoint
from extend.errors import CheckpointError
from extend.merge import merge
from extend.merge.total import Total
from tests.adapter_format.tiny_models import write_tokenizer
from tests.merge.test_apply import weights


@pytest.fixture
def sharded(llama, tmp_path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(llama.models.target)
    model.save_pretrained(tmp_path / "target", max_shard_size="40KB")
    write_tokenizer(tmp_path / "target")
    return tmp_path / "target"


def count_reads(monkeypatch, *, stop_after: int | None = None, error: BaseException | None = None):
    """Names of the tensors that are computed; the one after `stop_after` raises."""
    names, read = [], Total.read

    def counting(self, name):
        if stop_after is not None and len(names) == stop_after:
            raise error
        names.append(name)
        return read(self, name)
    monkeypatch.setattr(Total, "read", counting)
    return names


def in_file_order(target: Path) -> list[str]:
    files = Checkpoint(target)
    return [n for f in sorted(set(files.file_of.values())) for n in files.infos
            if files.file_of[n] == f]


def first_shards(target: Path, count: int) -> int:
    """Number of tensors in the first shards."""
    file_of = Checkpoint(target).file_of
    files = sorted(set(file_of.values()))[:count]
    return sum(file in files for file in file_of.values())


def assert_same(out: Path, other: Path) -> None:
    mine, theirs = weights(out), weights(other)
    assert set(mine) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(mine[name], value)
    outputs = json.loads((out / "manifest.json").read_text())["outputs"]
    for name, entry in outputs.items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert set(outputs) == {file.name for file in out.iterdir()} - {"manifest.json"}


def kill_after(adapter: Path, target: Path, out: Path, count: int) -> None:
    """A process that merges and is killed while it computes the tensor after `count`."""
    def work():
        names, read = [], Total.read

        def counting(self, name):
            names.append(name)
            if len(names) > count:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, name)
        Total.read = counting
        merge(adapter, target, out)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_merge_goes_on(llama, sharded, tmp_path, monkeypatch):
    whole = merge(llama.adapter, sharded, tmp_path / "whole")
    out = tmp_path / "outputs" / "out"
    done = first_shards(sharded, 2)
    kill_after(llama.adapter, sharded, out, done)
    assert not out.exists()
    names = count_reads(monkeypatch)
    merge(llama.adapter, sharded, out)
    assert names == in_file_order(sharded)[done:]
    assert_same(out, whole)
    assert os.listdir(out.parent) == ["out"]


def test_an_interrupted_merge_goes_on(llama, sharded, tmp_path, monkeypatch):
    done = first_shards(sharded, 1)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_reads(patch, stop_after=done, error=KeyboardInterrupt())
        merge(llama.adapter, sharded, out)
    assert (tmp_path / ".out.partial").is_dir()
    with monkeypatch.context() as patch:
        names = count_reads(patch)
        merge(llama.adapter, sharded, out)
    assert names == in_file_order(sharded)[done:]
    assert_same(out, merge(llama.adapter, sharded, tmp_path / "whole"))


@pytest.mark.parametrize("change", ["weight", "target", "adapter", "damage"])
def test_other_inputs_or_damaged_shards_start_anew(llama, adapter, sharded, tmp_path, monkeypatch,
                                                   change):
    out, options = tmp_path / "out", {}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_reads(patch, stop_after=first_shards(sharded, 2), error=KeyboardInterrupt())
        merge(adapter, sharded, out)
    shards = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
    assert len(shards) == 2
    if change == "weight":
        options = {"weight": 0.5}
    elif change == "damage":
        shards[1].write_bytes(shards[1].read_bytes()[:-1])
    else:
        file = (sharded if change == "target" else adapter) / "extra.txt"
        file.write_text("new")
    with monkeypatch.context() as patch:
        names = count_reads(patch)
        merge(adapter, sharded, out, **options)
    assert names == in_file_order(sharded)[first_shards(sharded, 1) if change == "damage" else 0:]
    assert_same(out, merge(adapter, sharded, tmp_path / "whole", **options))


def test_a_reported_error_leaves_nothing(llama, sharded, tmp_path, monkeypatch):
    count_reads(monkeypatch, stop_after=first_shards(sharded, 2), error=CheckpointError("wrong"))
    with pytest.raises(CheckpointError, match="wrong"):
        merge(llama.adapter, sharded, tmp_path / "out")
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()


def test_several_shards_at_once_give_the_same(llama, sharded, tmp_path, monkeypatch):
    whole = merge(llama.adapter, sharded, tmp_path / "whole")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    threads = torch.get_num_threads()
    assert_same(merge(llama.adapter, sharded, tmp_path / "out"), whole)
    assert torch.get_num_threads() == threads


def test_an_error_in_one_of_several_shards_ends_them_all(llama, sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    count_reads(monkeypatch, stop_after=5, error=CheckpointError("wrong"))
    with pytest.raises(CheckpointError):
        merge(llama.adapter, sharded, tmp_path / "out")
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()


def test_an_output_inside_the_target_is_no_part_of_it(llama, sharded, tmp_path, monkeypatch):
    outside = merge(llama.adapter, sharded, tmp_path / "outside")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_reads(patch, stop_after=first_shards(sharded, 1), error=KeyboardInterrupt())
        merge(llama.adapter, sharded, sharded / "merged")
    out = merge(llama.adapter, sharded, sharded / "merged")
    assert_same(out, outside)
    shutil.rmtree(out)
