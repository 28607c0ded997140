"""Output directories appear whole or not at all; copies and links."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from extend.checkpoint import TensorInfo, copy_side_files, write_checkpoint
from extend.errors import CheckpointError
from extend.output import (
    atomic_directory,
    copy_or_link,
    remove_directory,
    require_space,
    write_json,
)

INFOS = [TensorInfo("w", "F32", (3,))]


def zeros(_: str) -> torch.Tensor:
    return torch.zeros(3)


def test_directory_appears_when_complete(tmp_path):
    out = tmp_path / "new" / "out"
    with atomic_directory(out) as partial:
        (partial / "file").write_text("content")
        assert not out.exists()
    assert (out / "file").read_text() == "content"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_failure_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("content")
        raise error
    assert os.listdir(tmp_path) == []


def test_failure_keeps_the_old_output(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with (pytest.raises(ValueError, match="wrong"),
          atomic_directory(tmp_path / "out", overwrite=True) as partial):
        (partial / "file").write_text("new")
        raise ValueError("wrong")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_failure_of_the_last_step_restores_the_old_output(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    rename = Path.rename

    def failing(self, target):
        if self.name == ".out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (pytest.raises(CheckpointError, match="Input/output error"),
          atomic_directory(tmp_path / "out", overwrite=True)):
        pass
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("half")
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("content")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["file"]


def test_existing_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with atomic_directory(out) as partial:  # an empty directory is in nobody's way
        (partial / "file").write_text("one")
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(out):
        raise AssertionError
    with atomic_directory(out, overwrite=True) as partial:
        (partial / "other").write_text("two")
    assert os.listdir(out) == ["other"]
    for overwrite in (False, True):
        with (pytest.raises(CheckpointError, match="is a file"),
              atomic_directory(out / "other", overwrite=overwrite)):
            raise AssertionError


def test_no_space_left(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=100, used=90, free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="needs 11 bytes but only 10 bytes are free"):
        require_space(tmp_path, 11)
    require_space(tmp_path, 10)
    with (pytest.raises(CheckpointError, match="free space or choose another --out"),
          atomic_directory(tmp_path / "out") as partial):
        write_checkpoint(partial, INFOS, zeros)
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (pytest.raises(CheckpointError, match=r"out: .*no space left on the device; free space"),
          atomic_directory(tmp_path / "out") as partial):
        write_checkpoint(partial, INFOS, zeros)
    assert os.listdir(tmp_path) == []


def test_an_input_that_cannot_be_read_is_named(tmp_path):
    with (pytest.raises(CheckpointError, match=r"absent\.txt"),
          atomic_directory(tmp_path / "out") as partial):
        shutil.copyfile(tmp_path / "absent.txt", partial / "file")


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"text": "caf\u00e9", "n": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "text": "caf\u00e9", "n": 1}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"text": print})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["n"] == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_copy_or_link(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_text("content")
    (tmp_path / "symlink").symlink_to(source)
    copy_or_link(tmp_path / "symlink", tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source)
    assert not (tmp_path / "linked").is_symlink()

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    copy_or_link(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "content"
    assert not (tmp_path / "copied").samefile(source)


def test_side_files(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    out.mkdir()
    kept = ["tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json", "added_tokens.json",
            "special_tokens_map.json", "chat_template.jinja", "modeling_own.py", "LICENSE",
            "additional_chat_templates/tool.jinja"]
    for name in (*kept, "README.md", "model.safetensors", "optimizer.pt", "manifest.json"):
        (source / name).write_text(name)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 8, "x": 1}')
    (source / "generation_config.json").write_text('{"max_length": 8, "top_p": 0.5}')
    copy_side_files(source, out, max_len=64)
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert found == sorted([*kept, "tokenizer_config.json", "generation_config.json"])
    for name in kept:
        assert (out / name).read_text() == name
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "model_max_length": 64, "x": 1}
    assert json.loads((out / "generation_config.json").read_text()) == {"top_p": 0.5}


def test_removing_takes_the_name_away_first(tmp_path, monkeypatch):
    doomed = tmp_path / "state"
    (doomed / "step-1").mkdir(parents=True)
    with monkeypatch.context() as patch:  # as when a kill comes before the files are deleted
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove_directory(doomed)
    assert os.listdir(tmp_path) == [".state.removed"]
    remove_directory(doomed)  # what an earlier removal left goes too
    assert os.listdir(tmp_path) == []
