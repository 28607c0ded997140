"""What a user may write, which files of a repository are taken, and what is recorded."""

import logging
from pathlib import Path

import pytest

from extend.errors import CheckpointError
from extend.inputs.files import choose_files
from extend.inputs.names import as_hub_input, name_inputs, recorded_name

SHA = "0123456789abcdef0123456789abcdef01234567"
SNAPSHOT = f"/home/x/.cache/huggingface/hub/models--lab--base/snapshots/{SHA}"


@pytest.mark.parametrize(("text", "repo", "revision", "file"), [
    ("lab/base", "lab/base", None, None),
    ("lab/base@v1.0", "lab/base", "v1.0", None),
    ("lab/base@refs/pr/3", "lab/base", "refs/pr/3", None),
    ("lab/base:model-Q8_0.gguf", "lab/base", None, "model-Q8_0.gguf"),
    (f"lab/b.a_s-e@{SHA}:sub/model.gguf", "lab/b.a_s-e", SHA, "sub/model.gguf")])
def test_names_of_the_hub(text, repo, revision, file):
    found = as_hub_input(text)
    assert (found.id.repo, found.id.revision, found.file) == (repo, revision, file)
    assert str(found) == text


@pytest.mark.parametrize("text", [
    "base", "./lab/base", "../base", "/data/base", "a/b/c", "lab/", "lab/base@", "lab/ba se",
    "lab/base:", "lab/a--b", "lab/a..b", "C:\\models\\base", "~/base", ""])
def test_paths(text):
    assert as_hub_input(text) is None


def test_what_is_there_wins_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab" / "here").mkdir(parents=True)
    (tmp_path / "runs" / "long").mkdir(parents=True)
    (tmp_path / "runs" / "long" / "manifest.json").write_text("{}")
    with caplog.at_level(logging.INFO, logger="extend"):
        assert as_hub_input("lab/here") is None
        assert as_hub_input(Path("lab/here")) is None
        assert as_hub_input("runs/long") is None  # of a stage: nobody takes it for a repository
        assert as_hub_input("lab/there") is not None
    assert [record.getMessage() for record in caplog.records] == [
        "lab/here: read from the disk, where it is, not from a repository of that name on the Hub"]


def test_the_cache_is_never_recorded():
    assert str(recorded_name(SNAPSHOT)) == f"lab/base@{SHA}"
    assert str(recorded_name(f"{SNAPSHOT}/a/config.json")) == f"lab/base@{SHA}:a/config.json"
    assert recorded_name("/data/base") is recorded_name("models--lab--base/snapshots/main") is None
    told = {"a": [SNAPSHOT, 3, None], SNAPSHOT: {"c": "base"}, "d": "lab/base",
            "e": f"{SNAPSHOT} has {SNAPSHOT}/config.json."}
    assert name_inputs(told) == {
        "a": [f"lab/base@{SHA}", 3, None], f"lab/base@{SHA}": {"c": "base"}, "d": "lab/base",
        "e": f"lab/base@{SHA} has lab/base@{SHA}:config.json."}


def choose(*names: str, index: dict | None = None, weights: bool = True) -> list[str]:
    return choose_files(names, lambda: index, weights=weights)


def test_only_what_is_needed_is_taken():
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    beside = ["additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json",
              "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
    others = [".gitattributes", "consolidated.safetensors", "model.gguf", "onnx/model.onnx",
              "original/params.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
              "model-3.safetensors", "model.safetensors", "flax_model.msgpack", "figure.png"]
    shards = ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert choose(*beside, *others, *shards, index=index) == sorted(beside + shards)
    assert choose(*beside, *others, *shards, weights=False) == sorted(beside)
    others.remove("model-3.safetensors")
    assert choose(*beside, *others) == sorted([*beside, "model.safetensors"])


def test_adapters_with_all_of_ours():
    names = ["adapter_config.json", "adapter_model.safetensors", "extend_sidecar.json",
             "extend_sidecar.safetensors", "report.json"]
    assert choose(*names, "adapter_model.bin", "optimizer.pt") == sorted(names)
    assert choose(*names, weights=False) == sorted(names)


@pytest.mark.parametrize(("names", "told"), [
    (["config.json", "pytorch_model-1.bin"], "only as pytorch_model-1.bin, which can run any code"),
    (["adapter_config.json", "adapter_model.bin"], "only as adapter_model.bin"),
    (["config.json", "consolidated.00.pth"], "only as consolidated.00.pth"),
    (["README.md", "m-Q4_0.gguf"], "extend import ORG/NAME:m-Q4_0.gguf --out DIR"),
    (["config.json", "consolidated.safetensors"], "but consolidated.safetensors, which is not in"),
    (["README.md"], "it has no model.safetensors, model.safetensors.index.json or adapter_model"),
    (["model.safetensors"], "it has weights but no config.json"),
    (["adapter_model.safetensors", "config.json"], "no adapter_config.json")])
def test_what_cannot_be_read_is_refused(names, told):
    with pytest.raises(CheckpointError, match=told):
        choose(*names)


def test_an_index_that_does_not_fit():
    names = ["config.json", "model.safetensors.index.json", "model-1.safetensors"]
    with pytest.raises(CheckpointError, match="names 2 files, of which model-2.safetensors is not"):
        choose(*names, index={"weight_map": {"a": "model-1.safetensors",
                                             "b": "model-2.safetensors"}})
    with pytest.raises(CheckpointError, match="holds no weight_map"):
        choose(*names, index={})
