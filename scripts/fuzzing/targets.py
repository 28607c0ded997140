"""What is fuzzed: one function a parser, from bytes to nothing.

A target writes its bytes to where the parser looks for them, and lets it read. It may return, or
raise an ExtendError; anything else is a fault.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.serving_view import read_view
from extend.adapter_format.sidecar import read_sidecar
from extend.checkpoint import INDEX_NAME, Checkpoint, read_layout
from extend.documents import read_json_lines
from extend.errors import CheckpointError
from extend.evaluate.comparison import build_differences, build_table, to_markdown
from extend.evaluate.report import refresh
from extend.gguf.architectures import find_architecture
from extend.gguf.header import Header
from extend.gguf.stage import read_model_config
from extend.inputs.files import choose_files
from extend.inputs.names import HubInput
from extend.manifest import outputs_intact, read_manifest, recorded_content
from extend.model_config import parse_config, read_config
from extend.publish.metadata import read_front
from extend.recipe import check_recipe
from extend.recipe_text import set_values
from extend.results import read_results, reading_rows
from extend.tokenizer import read_vocabulary
from extend.untrusted import path_problem

Target = Callable[[bytes, Path], None]

_RECIPE = {"name": "fuzzed", "seed": 0, "stages": [
    {"name": "base", "stage": "rescale", "model": "org/model", "to": "8k"},
    {"name": "long", "stage": "train", "model": "base",
     "schedule": [{"length": 8192, "lr": 1e-5}]}]}
_MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8,
          "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
          "vocab_size": 8, "max_position_embeddings": 64, "rope_theta": 10000.0}


def recipe(data: bytes, folder: Path) -> None:
    """A whole recipe."""
    (folder / "recipe.yaml").write_bytes(data)
    check_recipe(folder / "recipe.yaml")


def overrides(data: bytes, folder: Path) -> None:
    """`--set KEY=VALUE`, one a line."""
    del folder
    set_values(_RECIPE, data.decode("utf-8", "replace").split("\n")[:8])


def config(data: bytes, folder: Path) -> None:
    """`config.json`."""
    (folder / "config.json").write_bytes(data)
    read_config(folder)


def header(data: bytes, folder: Path) -> None:
    """A safetensors file. Data that begin with R are the whole of it; others are its header, and
    the last two bytes the size of the body.
    """
    size = int.from_bytes(data[-2:], "little")
    whole = data[1:] if data[:1] == b"R" else (
        struct.pack("<Q", len(data[:-2])) + data[:-2] + bytes(size))
    (folder / "model.safetensors").write_bytes(whole)
    read_layout(folder / "model.safetensors")


def index(data: bytes, folder: Path) -> None:
    """`model.safetensors.index.json`, beside two shards."""
    for number, name in enumerate("ab", 1):
        shard = folder / f"model-{number:05d}-of-00002.safetensors"
        if not shard.exists():
            shard.write_bytes(small_file({f"{name}.weight": (2, 2)}))
    (folder / INDEX_NAME).write_bytes(data)
    Checkpoint(folder)


def adapter(data: bytes, folder: Path) -> None:
    """`adapter_config.json`, beside weights of rank 2."""
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        start = "base_model.model.model.layers.0.self_attn.q_proj"
        weights.write_bytes(small_file({f"{start}.lora_A.weight": (2, 8),
                                        f"{start}.lora_B.weight": (8, 2)}))
    (folder / "adapter_config.json").write_bytes(data)
    for read in (Adapter, read_view):
        try:
            read(folder)
        except CheckpointError:
            if read is read_view:
                raise


def sidecar(data: bytes, folder: Path) -> None:
    """`extend_sidecar.json`, and what a merge makes of its RoPE."""
    (folder / "extend_sidecar.json").write_bytes(data)
    found = read_sidecar(folder)
    if found is not None:
        parse_config(found.rope.apply(_MODEL), folder / "config.json")


def results(data: bytes, folder: Path) -> None:
    """`results.json`, and the table that a report makes of it."""
    (folder / "results.json").write_bytes(data)
    read = read_results({"a": folder / "results.json"})
    with reading_rows(read):
        read = [refresh(result) for result in read]
        to_markdown(["a"], build_table(read))
        build_differences([*read, *read])


def manifest(data: bytes, folder: Path) -> None:
    """`manifest.json` of a stage."""
    (folder / "manifest.json").write_bytes(data)
    recorded_content(read_manifest(folder))
    outputs_intact(folder)


def gguf(data: bytes, folder: Path) -> None:
    """A GGUF file up to its config."""
    path = folder / "model.gguf"
    path.unlink(missing_ok=True)  # an earlier one may still be mapped
    path.write_bytes(data)
    found = Header(path)
    read_model_config(found, find_architecture(found), "bfloat16")


def names(data: bytes, folder: Path) -> None:
    """What a user calls a model; and what the Hub lists, of which the files are chosen."""
    first, *listing = data.decode("utf-8", "replace").split("\n")[:12]
    found = HubInput.parse(first)
    if found is not None:
        assert HubInput.parse(str(found)) == found
        assert not found.id.revision or ".." not in found.id.revision
    shard_map = {"weight_map": dict(enumerate(listing))}
    for name in choose_files([n for n in listing if not path_problem(n)], lambda: shard_map):
        assert os.path.normpath(folder / name).startswith(f"{folder}{os.sep}")


def vocabulary(data: bytes, folder: Path) -> None:
    """`tokenizer.json`."""
    (folder / "tokenizer.json").write_bytes(data)
    read_vocabulary(folder)


def lines(data: bytes, folder: Path) -> None:
    """Training or evaluation text as JSON lines."""
    (folder / "text.jsonl").write_bytes(data)
    for _ in read_json_lines(folder / "text.jsonl"):
        pass


def card(data: bytes, folder: Path) -> None:
    """The metadata at the top of a model's README.md."""
    (folder / "README.md").write_bytes(data)
    read_front(folder)


def small_file(shapes: dict[str, tuple[int, int]]) -> bytes:
    """A safetensors file of zeros in fp32."""
    entries, place = {}, 0
    for name, (rows, columns) in shapes.items():
        size = rows * columns * 4
        entries[name] = {"dtype": "F32", "shape": [rows, columns],
                         "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(place)


def clean(folder: Path) -> None:
    """Empty a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (
        recipe, overrides, config, header, index, adapter, sidecar, results, manifest, gguf, names,
        vocabulary, lines, card)}