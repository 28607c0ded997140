"""Files that someone made to do harm: each is refused with one clear error, in bounded time."""

import importlib
import json
import os
import random
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.sidecar import read_sidecar
from extend.checkpoint import INDEX_NAME, Checkpoint, copy_side_files, read_layout
from extend.errors import CheckpointError, ExtendError, HubError, RecipeError
from extend.gguf.check import check_gguf
from extend.gguf.header import Header
from extend.hub import HubId
from extend.inputs import HubInput, pin
from extend.manifest import MANIFEST_NAME, outputs_intact, read_manifest
from extend.model_config import read_config, read_json
from extend.publish.metadata import read_front
from extend.recipe import load_recipe
from extend.recipe_text import set_values
from extend.results import read_results
from extend.untrusted import load_yaml, name_problem, parse_json
from scripts.fuzzing.mutate import mutate
from scripts.fuzzing.seeds import SEEDS, seeds_of
from scripts.fuzzing.targets import TARGETS, small_file

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def safetensors(path: Path, header: bytes | dict, body: int = 16,
                length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text
                     + bytes(body))
    return path


@pytest.mark.parametrize(("header", "told"), [
    ({"a": {**GOOD, "shape": [2, "2"]}}, "not consistent"),
    ({"a": {**GOOD, "shape": [2.0, 2]}}, "not consistent"),
    ({"a": {**GOOD, "shape": [True, 4]}}, "not consistent"),
    ({"a": {**GOOD, "shape": [float("inf")]}}, "not consistent"),
    ({"a": {**GOOD, "shape": [-2, -2]}}, "not consistent"),
    ({"a": {**GOOD, "shape": [1] * 65 + [4]}}, "not consistent"),
    ({"a": {**GOOD, "data_offsets": [0.0, 16.0]}}, "not consistent"),
    ({"a": {**GOOD, "data_offsets": [-16, 0]}}, "not consistent"),
    ({"a": {**GOOD, "dtype": ["F32"]}}, "not consistent"),
    ({"a": {**GOOD, "dtype": "BF16"}}, "not consistent"),
    ({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, "b": GOOD},
     "not consistent"),
    ({"a": GOOD, "b": GOOD}, "overlap or leave a gap"),
    ({"a": {**GOOD, "data_offsets": [2**63, 2**63 + 16]}}, "overlap or leave a gap"),
    (b'{"a": %s, "a": %s}' % ((json.dumps(GOOD).encode(),) * 2), "'a' is given twice"),
    (b'{"\\ud800": %s}' % json.dumps(GOOD).encode(), "damaged safetensors header"),
    (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "nested deeper than 100"),
    (b'{"a": ' + b"9" * 5000 + b"}", "damaged safetensors header")])
def test_headers(header, told, tmp_path):
    with pytest.raises(CheckpointError, match=told):
        read_layout(safetensors(tmp_path / "m.safetensors", header))


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 100_000_001])
def test_header_length(length, tmp_path):
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_layout(safetensors(tmp_path / "m.safetensors", {"a": GOOD}, length=length))


@pytest.mark.parametrize("name", [
    "../m.safetensors", "/etc/passwd", "a/../../m.safetensors", "..", ".", "", "m\x00.safetensors",
    "m\n.safetensors", "\u202em.safetensors", "x" * 300 + ".safetensors", "config.json",
    "..\\m.safetensors", None, ["m.safetensors"]])
def test_names_in_an_index(name, tmp_path):
    (tmp_path / "in").mkdir()
    for place in (tmp_path, tmp_path / "in"):
        (place / "m.safetensors").write_bytes(small_file({"a": (2, 2)}))
    (tmp_path / "in" / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError) as error:
        Checkpoint(tmp_path / "in")
    assert INDEX_NAME in str(error.value) and "\x00" not in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("config.json", "model.safetensors", "recipe.yaml"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        read_layout(tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match="a pipe or a device"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="at most 536,870,912 are read"):
        read_json(tmp_path / "config.json")


def test_links_out_of_a_checkpoint_are_not_copied(tmp_path):
    source, secret = tmp_path / "model", tmp_path / "secret"
    source.mkdir()
    (tmp_path / "out").mkdir()
    secret.write_text("key")
    (source / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError, match="LICENSE: is a link that leads out of"):
        copy_side_files(source, tmp_path / "out", max_len=8)
    assert list((tmp_path / "out").iterdir()) == []
    (source / "LICENSE").unlink()
    (source / "additional_chat_templates").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="leads out of"):
        copy_side_files(source, tmp_path / "out", max_len=8)


def test_links_within_a_checkpoint_and_the_hubs_cache_are(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--org--name" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "out"):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("terms")
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    copy_side_files(snapshot, tmp_path / "out", max_len=8)
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {
        "LICENSE": "terms", "NOTICE": "terms"}


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "a\x00b", ""])
def test_manifests_name_their_own_files(name, tmp_path):
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({
        "stage": "merge", "inputs": {}, "outputs": {name: {"bytes": 3, "sha256": "0" * 64}}}))
    for read in (read_manifest, outputs_intact):
        with pytest.raises(CheckpointError, match="it is no stage's manifest"):
            read(tmp_path)


LAUGHS = "a: &a [x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi"))
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize(("text", "told"), [
    (LAUGHS, r"r.yaml:2: alias \*a inside an anchored block"),
    (MERGES, r"r.yaml:2: alias \*a inside an anchored block"),
    ("a: &a [x]\nb: [" + "*a," * 101 + "]", "r.yaml:2: more than 100 aliases"),
    ("a: " + "[" * 41 + "]" * 41, "nested deeper than 40 levels"),
    ("a: " + "[" * 400, "nested deeper than 40 levels"),
    ("a: !!python/object/apply:os.system [id]", "the tag tag:yaml.org,2002:python"),
    ("a: !!timestamp x", "the tag tag:yaml.org,2002:timestamp"),
    ("a: !!bool x", "the tag tag:yaml.org,2002:bool"),
    ("name: x\nstages: [{name: a, stage: [b]}]", "stage: unknown"),
    ("# " + "x" * 2**18, "at most 262,144 are read")])
def test_yaml(text, told, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=told):
        load_recipe(tmp_path / "r.yaml")


def test_overrides_are_read_as_recipes_are():
    _, places, refused = set_values({"name": "x", "stages": []}, [
        "seed={" + MERGES.replace("\n", ", ") + "}", "seed=" + "[" * 400, "seed=!!bool x",
        ".".join("a" * 2000) + "=1"])
    assert places == {} and len(refused) == 4


def test_front_matter_is_read_as_recipes_are(tmp_path):
    for text in (LAUGHS, MERGES, "a: " + "[" * 400, "a: 2020-99-99", "a: !!bool x"):
        (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
        assert read_front(tmp_path) == {}


@pytest.mark.parametrize(("changes", "told"), [
    ({"rank_pattern": {"(a+)+$": 2}}, "may take for ever"),
    ({"rank_pattern": {r"(?=.)q": 2}}, "may take for ever"),
    ({"alpha_pattern": {".*.*.*q": 2}}, "may take for ever"),
    ({"rank_pattern": {"[": 2}}, "is no regular expression"),
    ({"rank_pattern": {"q" * 300: 2}}, "is longer than 256 characters"),
    ({"rank_pattern": ["q_proj"]}, "not an object"),
    ({"modules_to_save": "embed_tokens"}, "not a list"),
    ({"lora_alpha": float("nan")}, "not a number"),
    ({"lora_alpha": True}, "not a number"),
    ({"base_model_name_or_path": {}}, "not a str")])
def test_adapter_configs(changes, told, tmp_path):
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    (tmp_path / "adapter_model.safetensors").write_bytes(small_file({
        f"{start}.lora_A.weight": (2, 8), f"{start}.lora_B.weight": (8, 2)}))
    plain = json.loads((SEEDS / "adapter" / "plain.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain))
    assert list(Adapter(tmp_path).modules)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, **changes}))
    with pytest.raises(CheckpointError, match=told):
        Adapter(tmp_path)


def test_a_sidecar_cannot_bring_code(tmp_path):
    """Its keys go into the config of every merge: `auto_map` there would name code to run."""
    data = json.loads((SEEDS / "sidecar" / "llama.json").read_text())
    data["rope"]["config_keys"]["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "extend_sidecar.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="rope.config_keys"):
        read_sidecar(tmp_path)


@pytest.mark.parametrize("change", [
    {"rows": {}}, {"rows": [None]}, {"model": []}, {"summary": 3},
    {"model": {"max_position_embeddings": "x"}},
    {"rows": [{"name": "a", "task": "a", "length": 8, "score": float("nan"), "n": 1}]},
    {"rows": [{"name": "a", "task": "a", "length": "8", "score": 1, "n": 1}]},
    {"rows": [{"name": "a", "task": "a", "length": 8, "score": 1, "n": 0}]}])
def test_results(change, tmp_path):
    good = json.loads((SEEDS / "results" / "small.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(CheckpointError, match="was changed since it was written"):
        read_results({"a": tmp_path})


def gguf(place: int, value: int, kind: str = "Q") -> bytes:
    data = bytearray((SEEDS / "gguf" / "llama.gguf").read_bytes())
    struct.pack_into(f"<{kind}", data, place, value)
    return bytes(data)


FIRST_KEY = 24  # after magic, version and two counts: the length of the first key's name


@pytest.mark.parametrize(("place", "value", "told"), [
    (8, 2**60, "it announces"), (16, 2**60, "it announces"),
    (8, 10_000, "it ends at byte|has 0 dimensions"),
    (FIRST_KEY, 2**63, "a text of"), (FIRST_KEY, 1000, "it ends at byte|not UTF-8")])
def test_gguf_counts_and_lengths(place, value, told, tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf(place, value))
    with pytest.raises(CheckpointError, match=told):
        Header(tmp_path / "m.gguf")


def tensor_place(data: bytes) -> int:
    """Where the first tensor's number of dimensions stands."""
    return data.index(b"token_embd.weight") + len(b"token_embd.weight")


@pytest.mark.parametrize(("shift", "value", "kind", "told"), [
    (0, 5, "I", "has 5 dimensions"), (0, 0, "I", "has 0 dimensions"),
    (4, 2**62, "Q", "has the shape"), (4, 0, "Q", "has the shape"), (20, 999, "I", "the type 999"),
    (24, 2**40, "Q", "its tensors end at byte"), (24, 3, "Q", "from byte 3 on"),
    (24, 128, "Q", "overlap")])
def test_gguf_tensors(shift, value, kind, told, tmp_path):
    place = tensor_place((SEEDS / "gguf" / "llama.gguf").read_bytes())
    (tmp_path / "m.gguf").write_bytes(gguf(place + shift, value, kind))
    with pytest.raises(CheckpointError, match=told):
        check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00003-of-00002.gguf",
                                  "m-00001-of-99999.gguf"])
def test_gguf_parts(name, tmp_path):
    (tmp_path / name).write_bytes(gguf(4, 3, "I"))
    with pytest.raises(CheckpointError, match="is no part of a model"):
        Header(tmp_path / name)


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a/../b", "-x", "a b", "a\x00", "a\n"])
def test_revisions_stay_in_the_cache(revision):
    with pytest.raises(RecipeError, match="is no branch, tag or commit"):
        HubId.parse(f"org/name@{revision}")


@pytest.mark.parametrize("name", ["../../config.json", "/etc/passwd", "a\x00", "a\x1b[2J"])
def test_listings_of_the_hub_stay_in_the_cache(name, monkeypatch):
    module = importlib.import_module("extend.inputs.pin")
    info = SimpleNamespace(id="org/name", sha="0" * 40, gated=False, siblings=[
        SimpleNamespace(rfilename=name, size=1)])
    monkeypatch.setattr(module, "hub_api", lambda: SimpleNamespace(
        model_info=lambda *a, **k: info))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match="nothing was fetched") as error:
        pin(HubInput.parse("org/name"))
    assert "\x1b" not in str(error.value)


def test_what_the_strict_readers_take():
    """None of the above is refused for being unusual."""
    assert parse_json('{"a": {"b": [1, NaN]}, "c": "\\ud83d\\ude00"}')["c"] == "😀"
    assert load_yaml("a: &a [1, 2]\nb: *a\n") == {"a": [1, 2], "b": [1, 2]}
    assert name_problem("model-00001-of-00002.safetensors") is None
    assert str(HubId.parse("org/name@refs/pr/1")) == "org/name@refs/pr/1"


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_of_the_fuzzing(target, tmp_path):
    """Seeds, kept faults and some changes of each: `scripts/fuzz.py` tries a million."""
    chance, seeds = random.Random(target), seeds_of(target)
    number = 3 if target == "recipe" else 30
    small = [seed for seed in seeds if len(seed) < 1500] or seeds
    kept = [path.read_bytes() for path in sorted((SEEDS / target).glob("*"))] \
        if (SEEDS / target).is_dir() else []
    read = 0
    for data in [*kept, *small[:1], *(mutate(chance.choice(small), chance) for _ in range(number))]:
        try:
            TARGETS[target](data, tmp_path)
            read += 1
        except ExtendError:
            pass
    assert read  # a target that refuses everything tries nothing
