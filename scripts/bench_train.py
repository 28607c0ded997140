#!/usr/bin/env python3
"""Time training steps of a Llama-3.1-8B shape on all GPUs, with what layers keep and where.

    torchrun --nproc_per_node 2 scripts/bench_train.py --lengths 64k,128k,256k --out runs/train
    torchrun --nproc_per_node 2 scripts/bench_train.py --lengths 1m --trained lora+ \\
        --host-memory 200GiB --kept 0 --out runs/train
    torchrun --nproc_per_node 8 scripts/bench_train.py --lengths 1m --tensor-parallel 2 \\
        --out runs/tp

Random weights in bf16, one row over all GPUs, AdamW (moments in bf16, as of its parameters), no
data loading: the step of `extend train` as it is, with model, ring, memory and loss of its own.
MFU counts 6 FLOPs for each parameter of a matrix (the embedding left out) and token, 12 for each
pair of query and key and channel, halved for the causal mask; recompute is not counted; 989 TFLOP/s
of bf16 a GPU. Writes JSON and a table.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, not installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from extend.model_config import parse_config  # noqa: E402
from extend.option_types import parse_bytes, parse_length  # noqa: E402
from extend.ring import LAYOUTS  # noqa: E402
from extend.ring.hf_attention import RingSettings, register_ring_attention  # noqa: E402
from extend.train.compiled import compiles  # noqa: E402
from extend.train.low_bits import use_float8  # noqa: E402
from extend.train.mesh import Processes, join_processes, phase_mesh  # noqa: E402
from extend.train.model import CausalLoss  # noqa: E402
from extend.train.optim import build_optimizer, clip_gradients  # noqa: E402
from extend.train.recompute import save_memory  # noqa: E402
from extend.train.shard import shard_model  # noqa: E402
from extend.train.trained import choose_trained, init_adapters  # noqa: E402
from extend.train_options import Phase, TrainOptions  # noqa: E402

PEAK_FLOPS = 989e12
THETA = 3580165449.0
SETTINGS = ("recomputed", "compile", "kept", "host_memory", "form", "tile", "trained", "strategy",
            "kernel", "optimizer", "linear", "tensor_parallel")
KINDS = {"communication": "nccl", "attention": "cudnn|flash|fmha|_attn|attention|cutlass_fl",
         "matmul": "gemm|nvjet|xmma|cublas|splitK", "copy": "[Mm]emcpy|[Mm]emset",
         "compiled": "^triton_", "optimizer": "adam|multi_tensor|foreach|_norm_kernel",
         "elementwise": "elementwise|reduce|cat|Cat|index|scatter|gather"}
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="8b")
    add("--layers", type=int, help="only so many layers of the shape")
    add("--lengths", default="64k,128k,256k")
    add("--steps", type=int, default=2,
        help="timed at each length, after one to warm up; 0: the first one is timed")
    add("--recomputed", default="all", help="layers that are computed again: "
        "all, auto or a number")
    add("--compile", default="auto", choices=("auto", "yes", "no"))
    add("--kept", default="all", help="layers that keep their attention: all or a number")
    add("--host-memory", type=parse_bytes, default=0)
    add("--form", choices=("exact", "fp8"), default="exact")
    add("--tile", default="auto", help="tokens, auto or none")
    add("--trained", choices=("all", "lora+"), default="all",
        help="lora+: adapters of rank 32, norms and embeddings")
    add("--optimizer", default="adamw")
    add("--linear", default="compute", help="linear_dtype: compute, float8 or float8-rowwise")
    add("--tensor-parallel", type=int, default=1, help="processes that share heads and channels; "
        "the same for all of --configs")
    add("--strategy", default="auto")
    add("--kernel", default="auto")
    add("--profile", action="store_true", help="one more step, with time by kind of kernel")
    add("--configs", type=Path, help="JSON list of mappings, each a change to these options; all "
        "are measured one after the other")
    add("--label", default="")
    add("--commit", default="")
    add("--out", type=Path, required=True)
    return parser.parse_args()


def make_options(args: argparse.Namespace, longest: int) -> TrainOptions:
    return TrainOptions(
        model=".", data=[{"kind": "retrieval"}],
        schedule=[Phase(length=longest, steps=1, lr=1e-6)],
        recomputed_layers=int(args.recomputed) if args.recomputed.isdigit() else args.recomputed,
        mode="full" if args.trained == "all" else "lora", optimizer=args.optimizer,
        tensor_parallel=args.tensor_parallel,
        trained_beside=[] if args.trained == "all" else ["norms", "embeddings"],
        linear_dtype=args.linear,
        compile={"auto": "auto", "yes": True, "no": False}[args.compile],
        kept_attention=args.kept if args.kept == "all" else int(args.kept),
        host_memory=args.host_memory, kept_form=args.form, weight_dtype="bfloat16",
        tile_tokens={"auto": "auto", "none": None}.get(args.tile) if not args.tile.isdigit()
        else int(args.tile), strategy=args.strategy, kernel=args.kernel)


def build(args: argparse.Namespace, options: TrainOptions,
          processes: Processes) -> tuple[CausalLoss, Any, LlamaConfig]:
    shape = dict(SHAPES[args.shape])
    shape["num_hidden_layers"] = args.layers or shape["num_hidden_layers"]
    config = LlamaConfig(**shape, max_position_embeddings=1 << 20, tie_word_embeddings=False,
                         rope_parameters={"rope_type": "default", "rope_theta": THETA},
                         attn_implementation=register_ring_attention())
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.config.use_cache = False
    model.train()
    use_float8(model, options)
    choose_trained(model, options)
    read = parse_config(config.to_dict(), Path("config.json"))
    memory = save_memory(model, options, read, processes)
    loss = CausalLoss(model, options.loss_chunk, compiled=compiles(options, processes.device))
    module = shard_model(loss, processes, options)
    fill(model, config, processes.device)
    init_adapters(model, options.seed)
    return module, memory, config


@torch.no_grad()
def fill(model: LlamaForCausalLM, config: LlamaConfig, device: torch.device) -> None:
    """Random weights; and the frequencies, which were made without values."""
    dim = config.hidden_size // config.num_attention_heads
    frequencies = THETA ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    torch.manual_seed(0)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq = frequencies
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.ndim == 1:
            local.fill_(1.0)
        else:
            local.normal_(0, 0.02)


def local_batch(length: int, vocabulary: int, rank: int, world: int,
                device: torch.device) -> tuple[torch.Tensor, ...]:
    """ids, positions, labels and weights [1, s] of this rank's part of one random row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (length,), generator=generator)
    held = LAYOUTS["zigzag"].positions(length, rank, world)
    labels = torch.roll(ids, -1)
    weights = torch.full((len(held),), 1.0 / length)
    return tuple(t[None].to(device) for t in (ids[held], held, labels[held], weights))


def flops(config: LlamaConfig, length: int, trained: str) -> float:
    """Of one step; where only norms are trained, matrices need no weight gradient."""
    inner, heads = config.intermediate_size, config.num_attention_heads
    kv = config.hidden_size // heads * config.num_key_value_heads
    layer = config.hidden_size * (2 * config.hidden_size + 2 * kv + 3 * inner)
    matrix = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    linear = (6 if trained == "all" else 4) * matrix * length
    return linear + 6 * config.num_hidden_layers * config.hidden_size * length**2


def step(module: CausalLoss, memory: Any, args: argparse.Namespace, mesh: Any,
         batch: tuple[torch.Tensor, ...], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    ring = RingSettings(mesh.ring, "zigzag", args.kernel, args.strategy, None, memory)
    loss, _ = module(*batch, ring)
    loss.backward()
    norm = clip_gradients(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), float(norm)


def make_moments(optimizer: torch.optim.Optimizer, trained: list[torch.nn.Parameter]) -> None:
    """An update by nothing, so that the first step holds what later ones hold."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(length: int, module: CausalLoss, memory: Any, config: LlamaConfig,
            args: argparse.Namespace, processes: Processes,
            optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    on_gpu = processes.device.type == "cuda"
    mesh = phase_mesh(Phase(length=length, steps=1, lr=1e-6), processes)
    batch = local_batch(length, config.vocab_size, mesh.cp_rank, mesh.cp, processes.device)
    seconds = []
    for number in range(args.steps + 1):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        processes.barrier()
        begin = time.monotonic()
        loss, norm = step(module, memory, args, mesh, batch, optimizer)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begin)
        if number == 0 and processes.is_main:
            print(f"{length}: first step {seconds[0]:.1f} s, loss {loss:.3f}", flush=True)
    best = sum(seconds[1:]) / max(1, args.steps) if args.steps else seconds[0]
    work = flops(config, length, args.trained) / processes.world
    peak, held = (torch.cuda.max_memory_allocated() / 2**30,
                  torch.cuda.memory_allocated() / 2**30) if on_gpu else (None, None)
    reserved = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None
    kinds = profile_step(lambda: step(module, memory, args, mesh, batch, optimizer)) \
        if args.profile else None
    return {"length": length, "seconds": best, "first_seconds": seconds[0],
            "tokens_per_second_gpu": length / best / processes.world,
            "mfu": work / best / PEAK_FLOPS, "peak_gib": peak, "between_steps_gib": held,
            "reserved_gib": reserved, "recomputed": memory.recomputed if memory else 0,
            "host_gib": memory.inputs._pinned_bytes / 2**30 if memory else 0.0,
            "loss_share": loss, "grad_norm": norm, "layers": config.num_hidden_layers,
            "shape": args.shape,
            "settings": {key: getattr(args, key) for key in SETTINGS},
            "seconds_by_kind": kinds}


def profile_step(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds that the GPU spent on each kind of kernel in one call, streams added up."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for event in profiler.key_averages():
        seconds = event.self_device_time_total / 1e6
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)),
                    "other")
        found[kind] += seconds
        if kind in ("other", "elementwise", "attention", "copy"):
            other[f"{event.key[:110]} x{event.count}"] += seconds
    return {kind: round(value, 3) for kind, value in found.most_common()} | {
        f"* {name}": round(value, 3) for name, value in other.most_common(16)}


def main() -> int:
    args = parse()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    changes = json.loads(args.configs.read_text()) if args.configs else [{}]
    with join_processes(make_options(args, 1024)) as processes:
        rows = []
        for change in changes:
            rows += run(argparse.Namespace(**{**vars(args), **change}), processes)
            if processes.is_main:
                write(args, rows, processes)
        if processes.is_main:
            show(rows)
    return 0


def run(args: argparse.Namespace, processes: Processes) -> list[dict[str, Any]]:
    """The rows of one configuration, ended by one that did not fit."""
    lengths = [parse_length(text) for text in args.lengths.split(",")]
    options = make_options(args, max(lengths))
    module, memory, config = build(args, options, processes)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, options)
    make_moments(optimizer, trained)
    rows = []
    for length in lengths:
        try:
            row = measure(length, module, memory, config, args, processes, optimizer)
        except torch.OutOfMemoryError as error:
            row = {"length": length, "error": str(error)[:200],
                   "settings": {key: getattr(args, key) for key in SETTINGS}}
        rows.append(row)
        if processes.is_main:
            print(json.dumps(row), flush=True)
        if "error" in row:
            break
    del module, memory, optimizer, trained
    gc.collect()
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def write(args: argparse.Namespace, rows: list[dict[str, Any]], processes: Processes) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if processes.device.type == "cuda" else "CPU"
    commit = args.commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                                           capture_output=True, text=True).stdout.strip()
    name = f"{args.shape}-{args.label or 'steps'}"
    (args.out / f"{name}.json").write_text(json.dumps({
        "schema": 4, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit,
        "gpu": f"{processes.world} x {gpu}", "torch": torch.__version__, "rows": rows}, indent=1))


def show(rows: list[dict[str, Any]]) -> None:
    print("| shape, layers | tokens | s a step | tokens/s/GPU | MFU | GiB a GPU | host GiB |")
    for row in rows:
        if "error" not in row:
            print(f"| {row['shape']} {row['layers']} | {row['length']:,} | {row['seconds']:.2f} | "
                  f"{row['tokens_per_second_gpu']:.0f} | {row['mfu']:.1%} | "
                  f"{row['peak_gib'] or 0:.1f} | {row['host_gib']:.1f} |")


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
