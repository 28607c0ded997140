"""What a manifest records, and when an output counts as whole."""

import hashlib
import json
import os
import threading

import pytest

from extend.errors import CheckpointError
from extend.manifest import (
    MANIFEST_NAME,
    Hashes,
    Manifest,
    describe_inputs,
    hash_content,
    hash_file,
    hash_files,
    outputs_intact,
    peak_memory,
)


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.txt").write_bytes(b"alpha")
    (directory / "sub" / "b.txt").write_bytes(b"beta")
    return directory


@pytest.fixture
def done(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    manifest = Manifest("rescale", {"model": source}, {"target_len": 8, "pair": (1, 2)}, seed=3)
    (out / "weights").write_bytes(b"12345")
    manifest.write(out, factor=2.0)
    return out


def test_hashes(source):
    alpha, beta = (hashlib.sha256(text).hexdigest() for text in (b"alpha", b"beta"))
    assert hash_file(source / "a.txt") == hash_content(source / "a.txt") == alpha
    assert hash_files(source) == {"a.txt": {"bytes": 5, "sha256": alpha},
                                  "sub/b.txt": {"bytes": 4, "sha256": beta}}


def test_directory_hash_covers_names_and_contents_only(source, tmp_path):
    before = hash_content(source)
    os.utime(source / "a.txt", (0, 0))
    (source / MANIFEST_NAME).write_text("{}")
    assert hash_content(source) == before
    moved = source.rename(tmp_path / "elsewhere")
    assert hash_content(moved) == before
    (moved / "a.txt").write_bytes(b"alphb")
    assert hash_content(moved) != before
    (moved / "a.txt").rename(moved / "c.txt")
    (moved / "c.txt").write_bytes(b"alpha")
    assert hash_content(moved) != before


def test_metrics_of_a_stage_are_not_its_content(done):
    before = hash_content(done)
    (done / "metrics.jsonl").write_text('{"seconds": 1}')
    assert hash_content(done) == before
    (done / MANIFEST_NAME).unlink()  # in any other directory it is a file as any
    assert hash_content(done) != before


def test_missing_input(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file or directory"):
        describe_inputs({"model": tmp_path / "nowhere"})


def test_record(done, source):
    record = json.loads((done / MANIFEST_NAME).read_text())
    assert record["stage"] == "rescale"
    assert record["seed"] == 3
    assert record["options"] == {"target_len": 8, "pair": [1, 2]}
    assert record["inputs"] == {"model": {"path": str(source), "sha256": hash_content(source)}}
    assert record["outputs"] == {"weights": {
        "bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}}
    assert record["results"] == {"factor": 2.0}
    assert record["wall_seconds"] >= 0
    assert record["peak_memory_bytes"]["host"] > 2**20
    assert {"python", "extend", "torch", "transformers"} <= set(record["versions"])


def test_whole_output(done):
    assert outputs_intact(done) is None


def test_missing_or_changed_output(done):
    (done / "weights").write_bytes(b"123456")
    assert outputs_intact(done) == "its output weights is missing or was changed"
    (done / "weights").unlink()
    assert outputs_intact(done) == "its output weights is missing or was changed"


def test_no_manifest(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        outputs_intact(tmp_path)


def test_options_must_be_json(source):
    with pytest.raises(TypeError):
        Manifest("rescale", {"model": source}, {"function": print})


def test_peak_memory_is_in_bytes():
    assert 2**24 < peak_memory()["host"] < 2**45


def test_inputs_are_hashed_while_the_stage_works(source, tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(path):
        begun.set()
        assert go_on.wait(10)
        return hash_file(path)
    monkeypatch.setattr("extend.manifest.hash_file", slow)
    manifest = Manifest("merge", {"model": source}, {})
    assert begun.wait(10)  # the constructor is back, and no hash is there yet
    go_on.set()
    monkeypatch.undo()
    assert manifest.record["inputs"]["model"]["sha256"] == hash_content(source)


def test_an_input_that_changes_while_it_is_read_is_refused(source, tmp_path):
    manifest = Manifest("merge", {"model": source}, {})
    (source / "a.txt").write_bytes(b"longer than before")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"a\.txt: was changed while it was being read"):
        manifest.write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_input_that_vanishes_is_named(source):
    hashes = Hashes([source / "a.txt"])
    hashes.of(source / "a.txt")
    (source / "a.txt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.txt: cannot be read \(No such file"):
        hashes.of(source / "a.txt")


def test_hashing_stops_with_its_owner(tmp_path, monkeypatch):
    """A stage that fails does not read its inputs to the end."""
    files = [tmp_path / str(i) for i in range(50)]
    for file in files:
        file.write_bytes(b"x")
    go_on, seen = threading.Event(), []

    def slow(path):
        seen.append(path)
        assert go_on.wait(10)
        return ""
    monkeypatch.setattr("extend.manifest.hash_file", slow)
    before = set(threading.enumerate())
    hashes = Hashes(files)
    workers = set(threading.enumerate()) - before
    del hashes
    go_on.set()
    for worker in workers:
        worker.join(10)
    assert 1 <= len(seen) <= len(workers) <= 8
