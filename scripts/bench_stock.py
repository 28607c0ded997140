#!/usr/bin/env python3
"""Time training steps with what a user would put together from torch and transformers alone.

    torchrun --nproc_per_node 2 scripts/bench_stock.py --lengths 64k,128k,256k --out runs/train

The other side of scripts/bench_train.py, with its model, weights, rows and accounting: the model of
transformers, FSDP2 of every layer, torch's context parallelism (all-gather of keys and values,
cuDNN), every layer checkpointed whole, the loss in chunks of 8192 tokens, fused AdamW.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_train import PEAK_FLOPS, SHAPES, THETA, fill, flops, show, write
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from extend.option_types import parse_length
from extend.train.mesh import Processes, join_processes

_CHUNK = 8192


def sdpa(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, *,
         scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


class Whole(nn.Module):
    """The model and its loss in one forward, so that FSDP gathers the head for it."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=ids, position_ids=positions,
                                  use_cache=False).last_hidden_state
        parts = zip(hidden[0].split(_CHUNK), labels[0].split(_CHUNK), strict=True)
        return sum(checkpoint(chunk_loss, h, self.model.lm_head.weight, y, use_reentrant=False)
                   for h, y in parts)


def build(args: argparse.Namespace, processes: Processes) -> tuple[Whole, LlamaConfig]:
    AttentionInterface.register("stock", sdpa)
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=1 << 20,
                         tie_word_embeddings=False, attn_implementation="stock",
                         rope_parameters={"rope_type": "default", "rope_theta": THETA})
    if args.layers:
        config.num_hidden_layers = args.layers
    with torch.device("meta"):
        module = Whole(LlamaForCausalLM(config).to(torch.bfloat16))
    layers = module.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        fully_shard(layers[i], mesh=processes.mesh)
    fully_shard(module, mesh=processes.mesh, reshard_after_forward=False)
    module.to_empty(device=processes.device)
    fill(module.model, config, processes.device)
    return module.train(), config


def step(module: Whole, length: int, vocabulary: int, processes: Processes,
         optimizer: torch.optim.Optimizer) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(processes.device)
    labels = torch.roll(ids, -1, 1).clone()
    positions = torch.arange(length, device=processes.device)[None].clone()
    buffers = (ids, labels, positions)
    with context_parallel(processes.mesh, buffers=buffers, buffer_seq_dims=(1, 1, 1),
                          no_restore_buffers=set(buffers)), \
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        loss = module(ids, positions, labels) / length * processes.world  # FSDP averages
        loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()) / processes.world


def measure(args: argparse.Namespace, length: int, module: Whole, config: LlamaConfig,
            processes: Processes, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    seconds = []
    for _ in range(args.steps + 1):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        processes.barrier()
        begin = time.monotonic()
        loss = step(module, length, config.vocab_size, processes, optimizer)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - begin)
    best = sum(seconds[1:]) / args.steps if args.steps else seconds[0]
    return {"length": length, "seconds": best, "first_seconds": seconds[0],
            "tokens_per_second_gpu": length / best / processes.world,
            "mfu": flops(config, length, "all") / processes.world / best / PEAK_FLOPS,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "host_gib": 0.0,
            "loss_share": loss, "layers": config.num_hidden_layers, "shape": args.shape}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--lengths", default="64k,128k,256k")
    parser.add_argument("--steps", default="1", help="timed after one to warm up, at each length; "
                        "0: the first one is timed")
    parser.add_argument("--label", default="stock")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    set_rotate_method("allgather")
    with join_processes() as processes:
        module, config = build(args, processes)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
        rows = []
        lengths, counts = args.lengths.split(","), args.steps.split(",")
        for text, steps in zip(lengths, counts * (len(lengths) if len(counts) == 1 else 1),
                               strict=True):
            args.steps = int(steps)
            rows.append(measure(args, parse_length(text), module, config, processes, optimizer))
            if processes.is_main:
                print(json.dumps(rows[-1]), flush=True)
                write(args, rows, processes)
        if processes.is_main:
            show(rows)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        sys.exit(main())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
