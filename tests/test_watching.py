"""The reader of scripts/check_kills.py finds what is partial, and nothing else."""

import json
from pathlib import Path

from tests.train.tiny import save_model
from tests.watching import look


def test_the_reader_sees_what_is_partial(tmp_path: Path):
    model = save_model(tmp_path / "model")
    (model / "manifest.json").write_text(json.dumps({"outputs": {"config.json": {
        "bytes": (model / "config.json").stat().st_size}}}))
    (tmp_path / "index.html").write_text("<html></html>\n")
    (tmp_path / ".hidden.json").write_text("{")
    problems, count = look(tmp_path)
    assert problems == [] and count > 4
    weights = (model / "model.safetensors").read_bytes()
    cut = {"model/model.safetensors": weights[:-1], "index.html": b"<html>", "a.json": b'{"a',
           "b.jsonl": b'{"a": 1}\n{"a"', "c.png": b"\x89PNG", "d.txt": b"",
           "model/config.json": b"{}"}
    for name, data in cut.items():
        (tmp_path / name).write_bytes(data)
    problems, _ = look(tmp_path)
    assert {problem.removeprefix(f"{tmp_path}/").partition(":")[0] for problem in problems} == {
        *cut}
    (model / "config.json").unlink()
    assert any("config.json" in problem and "No such file" in problem
               for problem in look(tmp_path)[0])
