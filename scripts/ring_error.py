"""How far ring attention is from exact, against the number of ranks.

    python scripts/ring_error.py --out docs/results/ring-error.md

Errors are relative, |x - exact| / |exact| in the 2-norm over the whole tensor, of out, dq, dk and
dv against attention written down in fp64; the first row is torch's own kernel on one process. Ranks
are processes on the CPU (gloo), so that any number of them can be tried; the arithmetic is the same
as on GPUs: bf16 in and out of a block, fp32 inside, partial results joined as they are there.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from extend.ring import ring_attention, shard, unshard

NAMES = ("out", "dq", "dk", "dv")


def make_inputs(options):
    """q, k, v, dout [1, h, s, d], rounded to the dtype."""
    generator = torch.Generator().manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    shapes = [(1, h, options.length, options.head_dim) for h in heads]
    dtype = getattr(torch, options.dtype)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def exact(q, k, v, dout):
    """out, dq, dk, dv in fp64, one query head at a time."""
    q, k, v, dout = (t.double() for t in (q, k, v, dout))
    group, future = q.shape[1] // k.shape[1], torch.ones(q.shape[2], q.shape[2]).bool().triu(1)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for head in range(q.shape[1]):
        leaves = [t.detach().requires_grad_() for t in
                  (q[:, head], k[:, head // group], v[:, head // group])]
        scores = (leaves[0] @ leaves[1].mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        result = scores.softmax(-1) @ leaves[2]
        grads = torch.autograd.grad(result, leaves, dout[:, head])
        out[:, head], dq[:, head] = result.detach(), grads[0]
        dk[:, head // group] += grads[1]
        dv[:, head // group] += grads[2]
    return out, dq, dk, dv


def one_call(q, k, v, dout):
    """out, dq, dk, dv of torch's own kernel."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def work(rank, world, directory, strategy, layout, options):
    """One rank: compute its part and leave it in a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world)
    q, k, v, dout = (shard(t, 2, layout, rank, world) for t in make_inputs(options))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = ring_attention(q, k, v, layout=layout, strategy=strategy)
    out.backward(dout)
    torch.save((out.detach(), q.grad, k.grad, v.grad), f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world, strategy, layout, options):
    """out, dq, dk, dv put together from `world` processes."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (world, directory, strategy, layout, options), nprocs=world)
        parts = [torch.load(f"{directory}/{rank}.pt") for rank in range(world)]
    return [unshard(shards, 2, layout) for shards in zip(*parts, strict=True)]


def errors(results, expected):
    return [((got.double() - want).norm() / want.norm()).item()
            for got, want in zip(results, expected, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--worlds", default="2,4,8,16")
    parser.add_argument("--strategies", default="ring,all-gather,ulysses")
    parser.add_argument("--out", help="a file for the table; default: standard output")
    options = parser.parse_args()
    inputs = make_inputs(options)
    expected = exact(*inputs)
    rows = [("one call", 1, errors(one_call(*inputs), expected))]
    for strategy in options.strategies.split(","):
        for world in map(int, options.worlds.split(",")):
            results = on_ranks(world, strategy, "zigzag", options)
            rows.append((strategy, world, errors(results, expected)))
            print(rows[-1], file=sys.stderr)
    text = table(rows, options)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")


def table(rows, options):
    head = (f"Relative error of causal attention, {options.length} tokens, {options.heads} query "
            f"and {options.kv_heads} key heads, head_dim {options.head_dim}, {options.dtype}, "
            "zigzag\n"
            f"(`{' '.join(sys.argv)}`, torch {torch.__version__}, CPU)\n")
    lines = [head, "| strategy | ranks | out | dq | dk | dv |",
             "| --- | --- | --- | --- | --- | --- |"]
    for strategy, world, values in rows:
        cells = " | ".join(f"{value:.2e}" for value in values)
        lines.append(f"| {strategy} | {world} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
