"""Section accuracy: out, dq, dk and dv of whole sequences against fp64.

A result may be 2.5 times as wrong as one call of torch's flash attention on the same tensors, plus
2e-3 (the gate of Dao-AILab/flash-attention#2723). Kernels refuse what they cannot do: that is
listed, and fails the run only where a contender of ours did nothing at all.
"""

import itertools
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_bench.contenders import Contender, Ours
from ring_bench.flash_attn_shim import flash_impl
from ring_bench.peers import Peer
from ring_bench.problems import Problem, cut_documents
from ring_bench.session import Session

NAMES = ("out", "dq", "dk", "dv")
WINDOW, DOCUMENTS = 96, 5


def run_accuracy(
    session: Session, contenders: list[Ours], peers: list[Peer], options: Any, seconds: float
) -> dict[str, Any]:
    """All cases that fit into `seconds`; the rest is counted as dropped."""
    cases = [(c, problem) for problem in problems(session, options) for c in contenders]
    cases += [(peer, problem) for problem in problems(session, options)[:2] for peer in peers]
    end, rows = session.left() - seconds, []
    for contender, problem in cases:
        if session.left() < end:
            break
        rows.append(check(session, contender, problem))
    verdict = {"rows": rows, "cases": len(cases), "dropped": len(cases) - len(rows)}
    verdict["idle"] = idle(rows)
    failed = sum(row["state"] == "failed" for row in rows if row["family"] == "ours")
    verdict["failed"] = failed + len(verdict["idle"])
    return verdict


def problems(session: Session, options: Any) -> list[Problem]:
    """Heads x head sizes x masks, the sizes of the timed shape first."""
    seq_len = options.accuracy_rows * session.world
    shapes = [
        (heads, head_dim)
        for head_dim in sorted(options.accuracy_head_dims, key=lambda d: d != options.head_dim)
        for heads in sorted(options.accuracy_heads, key=lambda h: h[0] != options.heads)
    ]
    documents = cut_documents(seq_len, min(DOCUMENTS, seq_len // (2 * session.world)),
                              2 * session.world)  # fmt: skip
    masks = ({}, {"cu_seqlens": documents}, {"window": min(WINDOW, seq_len // 2)},
             {"causal": False})  # fmt: skip
    return [
        Problem(seq_len, *heads, head_dim, options.dtype, **mask)
        for heads, head_dim in shapes
        for mask in masks
    ]


def check(session: Session, contender: Contender, problem: Problem) -> dict[str, Any]:
    """One row: the worst of out, dq, dk and dv as a fraction of what is allowed."""
    heads = f"{problem.heads}:{problem.kv_heads} d{problem.head_dim} {problem.dtype}"
    row = {"name": contender.name, "kernel": contender.kernel, "family": contender.family,
           "mask": problem.mask, "shape": heads}  # fmt: skip
    results, reason = session.attempt(lambda: compute(session, contender, problem))
    if reason:
        refused = reason.startswith(("CompatibilityError", "LayoutError"))
        return {**row, "state": "refused" if refused else "failed", "reason": reason}
    used, worst = compare(results, exact(problem, session), one_flash_call(problem, session))
    used = session.slowest(used)  # nan counts as infinite in compare
    return {**row, "state": "ok" if used <= 1 else "failed", "used": used, "reason": worst}


def compute(session: Session, contender: Contender, problem: Problem) -> list[Tensor]:
    """out, dq, dk, dv of the whole sequence in order, gathered from all ranks."""
    held = [contender.positions(problem, rank, session.world) for rank in range(session.world)]
    mine = held[session.rank].to(session.device)
    tensors = problem.tensors(problem.seq_len, session.device)
    q, k, v, dout = (t.index_select(2, mine) for t in tensors)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with contender.context():
        out = contender.build(problem, session)(*leaves)
        grads = torch.autograd.grad(out, leaves, dout)
    order = torch.argsort(torch.cat(held)).to(session.device)
    return [_gather(t.detach(), session).index_select(2, order) for t in (out, *grads)]


def _gather(t: Tensor, session: Session) -> Tensor:
    t = t.contiguous()
    parts = [torch.empty_like(t) for _ in range(session.world)]
    dist.all_gather(parts, t)
    return torch.cat(parts, 2)


def compare(
    results: list[Tensor], expected: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> tuple[float, str]:
    """(largest error as a fraction of what is allowed, its name and size)."""
    worst = (0.0, "")
    for name, got, want, flash in zip(NAMES, results, expected, baseline, strict=True):
        error = (got.double() - want).abs().max().item()
        allowed = 2.5 * (flash.double() - want).abs().max().item() + 2e-3
        used = error / allowed if error == error else float("inf")
        worst = max(worst, (used, f"{name} {error:.1e} of {allowed:.1e}"))
    return worst


def idle(rows: list[dict[str, Any]]) -> list[str]:
    """Contenders of ours that refused everything they were asked for."""
    states: dict[str, set[str]] = {}
    for row in rows:
        if row["family"] == "ours":
            states.setdefault(row["name"], set()).add(row["state"])
    return [name for name, found in states.items() if found == {"refused"}]


def allowed_pairs(problem: Problem, device: torch.device) -> Tensor:
    """bool [s, s]: which keys a query may see."""
    position = torch.arange(problem.seq_len, device=device)
    behind = position[:, None] - position
    allowed = behind < (problem.window or problem.seq_len)
    if problem.causal:
        allowed &= behind >= 0
    if problem.cu_seqlens:
        ends = torch.tensor(problem.cu_seqlens[1:], device=device)
        document = torch.bucketize(position, ends, right=True)
        allowed &= document[:, None] == document
    return allowed


@lru_cache(maxsize=2)
def exact(problem: Problem, session: Session) -> tuple[Tensor, ...]:
    """out, dq, dk, dv in fp64, from the definition and autograd."""
    q, k, v, dout = (t.double() for t in problem.tensors(problem.seq_len, session.device))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    group = problem.heads // problem.kv_heads
    scores = q @ k.repeat_interleave(group, 1).mT / problem.head_dim**0.5
    scores = scores.masked_fill(~allowed_pairs(problem, session.device), float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@lru_cache(maxsize=2)
def one_flash_call(problem: Problem, session: Session) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of torch's flash kernel on the whole sequence; packed: a call a document."""
    *leaves, dout = problem.tensors(problem.seq_len, session.device)
    leaves = [t.requires_grad_() for t in leaves]
    bounds = problem.cu_seqlens or (0, problem.seq_len)
    with flash_impl(None):
        parts = [
            _flash(problem, *(t[:, :, a:b] for t in leaves)) for a, b in itertools.pairwise(bounds)
        ]
        out = torch.cat(parts, 2)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)


def _flash(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if problem.window and q.is_cuda and problem.dtype != "fp32":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False,
            window_size_left=problem.window - 1, window_size_right=0,
        )  # fmt: skip
        return out.transpose(1, 2)
    if problem.window:
        mask = allowed_pairs(problem, q.device)
        group = problem.heads // problem.kv_heads
        wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask)
    if problem.dtype == "fp32" and q.is_cuda:  # a kernel that wants as many KV heads
        group = problem.heads // problem.kv_heads
        wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=problem.causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=problem.causal, enable_gqa=True
        )
