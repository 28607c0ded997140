"""Nothing private is sent, and what only looks private can be let through."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import extend
from extend.errors import RecipeError
from extend.hub import hide_tokens
from extend.publish import leaks
from extend.publish.leaks import Privacy
from tests.hub import Hub

TOKEN = "hf_" + "aB3" * 11


def find(tmp_path: Path, name: str, text: str, **options: object) -> list[str]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = Privacy(options.pop("paths", []), **options).search([(name, tmp_path / name)])
    return [f"{leak.line}: {leak.kind}: {leak.text}" for leak in found]


@pytest.mark.parametrize(("text", "told"), [
    ("one\nsee /home/ann/models/x", ["2: a local path: /home/ann/models/x"]),
    ('{"a": "/mnt/disk/b.jsonl"}', ["1: a local path: /mnt/disk/b.jsonl"]),
    ("~/checkpoints/long", ["1: a local path: ~/checkpoints/long"]),
    (r'{"a": "C:\\Users\\ann\\x"}', [r"1: a local path: C:\\Users\\ann\\x"]),
    ("file:///srv/x", ["1: a local path: file:///srv/x"]),
    (f"token {TOKEN}", ["1: a token: hf_aB..."]),
    ("sk-" + "a1" * 12, ["1: a token: sk-a1..."]),
    ("https://huggingface.co/data/set/x and 3/4, n/a, and/or, tokens/s, -/+", []),
    ("the folder models/a, a/b/c, <p>/data</p>", []),
    ('"predicted": "in /home/ann/x", "n": 2', []),
    ('"answer": ["/home/ann/x", "b"], "path": "/home/ann/y"', ["1: a local path: /home/ann/y"]),
])
def test_what_is_found(tmp_path: Path, text: str, told: list[str]):
    assert find(tmp_path, "notes.json", text) == told


def test_known_paths_are_found_anywhere(tmp_path: Path):
    told = ["1: a local path: /z/private/run"]
    assert find(tmp_path, "a.json", '"predicted": "/z/private/run"', paths=["/z/private/run"]) \
        == told
    assert find(tmp_path, "tokenizer.json", '{"/z/private/run": 3, "/home/ann/x": 4}',
                paths=["/z/private/run"]) == told
    assert find(tmp_path, "a.md", "/z/private/runs", paths=["/z/private/run"]) == []


def test_users_and_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leaks, "_user", lambda: "annabel")
    monkeypatch.setattr(leaks, "_host", lambda: "node17-a")
    text = "by annabel on node17-a, annabelle"
    assert find(tmp_path, "a.md", text) == ["1: the name of this user: annabel",
                                            "1: the name of this host: node17-a"]
    assert find(tmp_path, "a.md", text, public=["annabel/model"], allow=["node17-a"]) == []
    monkeypatch.setattr(leaks, "_user", lambda: "root")
    assert find(tmp_path, "a.md", "the root of it", allow=[]) == []


def test_the_token_in_use_is_never_allowed(tmp_path: Path, hub: Hub):
    from tests.hub import WRITER

    assert find(tmp_path, "a.md", f"x={WRITER}", allow=[WRITER]) == ["1: a token: hf_du..."]
    assert hide_tokens(f"Bearer {WRITER}.") == "Bearer ***."


def test_metadata_of_weights(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"source": "/home/ann/base"})
    leak, = Privacy([]).search([("w.safetensors", path)])
    assert (leak.kind, leak.text) == ("a local path", "/home/ann/base")


def test_a_file_with_a_path_is_refused_before_anything_is_sent(hub: Hub, run: Path,
                                                               tmp_path: Path):
    copied = copy_with(run / "adapter", tmp_path / "adapter", "report.json",
                       {"note": "/home/ann/notes.txt"})
    options = {"base_id": "maker/base", "license": "mit", "results": {}, "dry_run": True}
    hub.add("maker/base", {"README.md": "# Base"})
    with pytest.raises(RecipeError) as refused:
        extend.publish(copied, "lab/long", **{**options, "dry_run": False})
    assert str(refused.value) == (
        "what is to be sent holds something private:\n"
        "report.json:2: a local path, /home/ann/notes.txt\n"
        "name models by their repository (--base-id, --id), change the file, or let a text "
        "through with --allow TEXT")
    assert set(hub.repos) == {"maker/base"}
    extend.publish(copied, "lab/long", **options, allow=["/home/ann/notes.txt"])


def copy_with(source: Path, out: Path, name: str, content: dict) -> Path:
    """An output with another content of a file, and a manifest that knows it."""
    import shutil

    from extend.manifest import hash_files

    shutil.copytree(source, out)
    (out / name).write_text(json.dumps(content, indent=2))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["outputs"] = hash_files(out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out
