"""A merge, its dry run and `lineage` on a checkpoint of 70B's shape, of sparse files.

Base and target are files of the right size with little content, norms and the first elements of
each matrix: reading the rest gives zeros, and takes the same memory as any other. The adapter is
PEFT's, rank 16, of random numbers.
"""

import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from surgery_bench.measure import run
from surgery_bench.shapes import SHAPES, Shape

from extend.checkpoint import TensorInfo
from load_check.record import ROOT, environment

LIMIT_BYTES = 3_000_000_000
"""Of memory that no file backs, beside the largest tensor."""
RANK = 16
FILLED = 32768
"""The first elements of each matrix that are not zero."""
SHARD_BYTES = 5_000_000_000
SHAPE_70B = Shape(80, 8192, 28672, 64, 8, 128, 128256, False)


def check(work: Path, shape_name: str, layers: int) -> tuple[dict[str, Any], list[str]]:
    """Merge so many layers of the shape; the dry run always sees all of them."""
    shape = SHAPE_70B if shape_name == "70b" else SHAPES[shape_name]
    whole, layers = _prepare(work / "whole", shape), min(layers, shape.layers)
    part = whole if layers == shape.layers else _prepare(work / "part",
                                                         replace(shape, layers=layers))
    largest = max(info.num_bytes for info in shape.tensors())
    commands = {
        "dry run, all layers": [sys.executable, "-m", "extend", "merge", "--dry-run", "--adapter",
                                str(whole / "adapter"), "--target", str(whole / "target"),
                                "--rope-from", str(whole / "long"), "--out",
                                str(work / "dry"), "--json"],
        f"lineage, {layers} layers": [
            sys.executable, "-m", "extend", "lineage", "--base", str(part / "base"), "--target",
            str(part / "target"), "--json"],
        f"merge, {layers} layers": [
            sys.executable, str(ROOT / "scripts/load_check/discard.py"),
            *(str(part / name) for name in ("adapter", "target", "merged", "long"))]}
    figures: dict[str, Any] = {
        "shape": f"{shape.layers} layers, hidden {shape.hidden}, MLP {shape.mlp}, vocabulary "
                 f"{shape.vocab}, bf16",
        "checkpoint, bytes by its headers": sum(info.num_bytes for info in shape.tensors()),
        "checkpoint, bytes on disk": _on_disk(whole / "target"),
        "largest tensor, bytes": largest, "bound, bytes": LIMIT_BYTES + largest}
    failures = []
    for name, command in commands.items():
        row = run(command, work / "log.txt", environment=environment())
        text = (work / "log.txt").read_text(errors="replace")
        figures[name] = {"seconds": round(row["seconds"], 1),
                         "CPU seconds": round(row["cpu_seconds"], 1),
                         "peak, bytes": row["anonymous_bytes"],
                         "peak with mapped files, bytes": row["resident_bytes"]}
        if row["exit_code"] != 0:
            failures.append(f"{name}: exit code {row['exit_code']}: {text[-1500:]}")
        elif row["anonymous_bytes"] > LIMIT_BYTES + largest:
            failures.append(f"{name}: {row['anonymous_bytes']:,} bytes of memory, more than "
                            f"{LIMIT_BYTES + largest:,}")
    if (part / "merged").is_dir():
        figures["merged, bytes by its files' sizes"] = sum(
            file.stat().st_size for file in (part / "merged").glob("*.safetensors"))
        figures["merged, bytes on disk"] = _on_disk(part / "merged")
        figures["merged, tensors"] = len(list(_names(part / "merged")))
        if set(_names(part / "merged")) != set(_names(part / "target")):
            failures.append("the merged checkpoint does not have the target's tensors")
    return figures, failures


def _prepare(root: Path, shape: Shape) -> Path:
    for role, theta, length in (("base", 5e5, 8192), ("target", 5e5, 8192)):
        write_sparse(root / role, shape.tensors())
        _write_rest(root / role, shape, theta, length)
    (root / "long").mkdir()
    _write_rest(root / "long", shape, 8e6, 131072)
    _write_adapter(root / "adapter", shape)
    return root


def _write_rest(directory: Path, shape: Shape, theta: float, length: int) -> None:
    (directory / "config.json").write_text(json.dumps(shape.config(theta, length)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "assets/demo/base" / name, directory / name)


def write_sparse(directory: Path, infos: Sequence[TensorInfo]) -> None:
    """A sharded checkpoint with holes for its matrices, and ones for its norms."""
    directory.mkdir(parents=True)
    shards: list[list[TensorInfo]] = [[]]
    for info in infos:
        if shards[-1] and sum(i.num_bytes for i in shards[-1]) + info.num_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(info)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {info.name: name for info in shard}
        _write_hollow(directory / name, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {"total_size": sum(info.num_bytes for info in infos)},
        "weight_map": weight_map}))


def _write_hollow(path: Path, infos: Sequence[TensorInfo]) -> None:
    header, position = {}, 0
    for info in infos:
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape),
                             "data_offsets": [position, position + info.num_bytes]}
        position += info.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
        for info in infos:
            file.seek(8 + len(text) + header[info.name]["data_offsets"][0])
            if len(info.shape) == 1:
                file.write(b"\x80\x3f" * info.shape[0])  # 1.0
            else:
                file.write(b"\x80\x3c" * min(math.prod(info.shape), FILLED))  # 2 ** -6


def _write_adapter(directory: Path, shape: Shape) -> None:
    directory.mkdir()
    generator, tensors, modules = torch.Generator().manual_seed(0), {}, set()
    for info in shape.tensors():
        if ".layers." not in info.name or len(info.shape) != 2:
            continue
        module = info.name.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        rank = min(RANK, *info.shape)
        for letter, size in (("A", (rank, info.shape[1])), ("B", (info.shape[0], rank))):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = torch.randn(
                size, generator=generator, dtype=torch.float32).mul_(0.01).bfloat16()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base",
        "r": min(RANK, shape.hidden), "lora_alpha": min(RANK, shape.hidden), "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(modules), "modules_to_save": None,
        "fan_in_fan_out": False, "inference_mode": True}))


def _on_disk(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.glob("*.safetensors"))


def _names(directory: Path) -> Iterator[str]:
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            yield from (name for name in json.loads(opened.read(size)) if name != "__metadata__")
