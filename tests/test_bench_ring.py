"""scripts/bench_ring.py: the whole of it on two processes, and the arithmetic of its reports."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as when the script itself is run

from ring_bench import flash_attn_shim
from ring_bench.accuracy import compare, idle
from ring_bench.contenders import OneGpu, Ours
from ring_bench.memory import Event, exposed
from ring_bench.peers import Peer
from ring_bench.problems import Problem, cut_documents
from ring_bench.timing import Entry, efficiencies, repeats, single_scale

from tests.forked import run_python

ROOT = Path(__file__).parents[1]
TORCHRUN = """\
from torch.distributed.run import main
from tests.forked import forked_workers

with forked_workers():
    main()
"""
SMALL = [
    "--device", "cpu", "--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--accuracy-head-dims", 16,
    "--accuracy-rows", 32, "--accuracy-heads", "4:2", "--documents", 4, "--window", 24,
    "--rounds", 2, "--commit", "abc",
]  # fmt: skip


def run(*arguments, processes=1):
    """The script alone, or as torchrun starts it."""
    script = ROOT / "scripts" / "bench_ring.py"
    if processes == 1:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(variable, None)
        return run_python([script, *arguments], env=environment, timeout=120)
    launcher = ["-c", TORCHRUN, "--standalone", "--nproc_per_node", processes]
    return run_python(
        [*launcher, script, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """ring.json and table.md of all sections on two processes."""
    out = tmp_path_factory.mktemp("ring")
    result = run(
        *SMALL, "--lengths", "64,128", "--out", out, "--peers", "ulysses@cudnn,rfa-nothing",
        "--strategies", "ring,ring/striped,all-gather,ulysses,auto", "--budget-seconds", 60,
        "--sections", "memory,accuracy,time,packed,window,calibrate,profile", processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((out / "ring.json").read_text()), (out / "table.md").read_text(), out


def test_every_strategy_is_checked_under_every_mask(bench):
    found, _, _ = bench
    rows = [row for row in found["accuracy"]["rows"] if row["family"] == "ours"]
    assert {row["mask"] for row in rows} == {"dense", "packed 5", "window 32", "not causal"}
    assert len(rows) == 5 * 4
    assert {row["state"] for row in rows} == {"ok"}
    assert all(0 < row["used"] <= 1 for row in rows)
    assert (found["accuracy"]["failed"], found["accuracy"]["dropped"]) == (0, 0)


def test_everybody_is_timed_and_compared_with_one_process(bench):
    found, table, _ = bench
    dense = found["time"]
    assert [group["seq_len"] for group in dense] == [64, 128]
    for group in [*dense, *found["packed"], *found["window"]]:
        assert group["rounds"] == 2
        kinds = {(row["name"], row["kind"]) for row in group["rows"] if row["family"] == "ours"}
        assert len(kinds) == 5 * 2
        for row in group["rows"]:
            assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
            if row["family"] == "ours":
                assert row["eff_best"] == row["eff_same"] > 0  # there is one kernel only
                assert (row["eff_local"] is not None) == (group["mask"] == "dense")
    assert "| ring/striped [flash_cpu] |" in table
    assert "## window 24, 128 tokens (2 of 2 rounds)" in table
    assert "no peer 'rfa-nothing'; there are torch-allgather" in table  # listed with its reason
    assert {row["name"] for row in dense[0]["rows"] if row["family"] == "peer"} == {"ulysses@cudnn"}


def test_the_report_says_where_it_comes_from(bench):
    found, table, _ = bench
    assert found["commit"] == "abc" and found["torch"] == torch.__version__
    assert found["command"].startswith("torchrun --nproc_per_node 2 ")
    assert "--sections memory,accuracy,time" in found["command"]
    assert (found["world"], found["dropped"]) == (2, [])
    assert found["command"] in table and "4:2 heads, head_dim 16, bf16" in table


def test_rates_are_fitted_and_predictions_stand_beside_measurements(bench):
    found, table, _ = bench
    rates = found["calibration"]["kernels"]["flash_cpu"]["kernel"]
    assert all(rates[kind]["peak"] > 0 for kind in ("square", "rectangle_backward"))
    predictions = found["calibration"]["predictions"]
    timed = {(row["name"], row["kind"]) for row in found["time"][0]["rows"]}
    assert {(row["name"], row["kind"]) for row in predictions} < timed  # "auto" is not predicted
    assert len(predictions) == 2 * 2 * 4
    assert "predicted / measured" in table
    assert "transport 'peer' does not work" in found["calibration"]["not_measured"]["pull"]


def test_what_needs_a_gpu_says_so(bench):
    found, _, _ = bench
    assert all("needs CUDA" in row["reason"] for row in [*found["memory"], *found["profile"]])


def test_the_plot_is_made_later_without_processes(bench):
    _, _, out = bench
    (out / "plot.png").unlink(missing_ok=True)
    result = run("--plot", out / "ring.json")
    assert result.returncode == 0, result.stderr
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_there_is_no_time_for_is_listed(tmp_path):
    result = run(*SMALL, "--lengths", 64, "--out", tmp_path, "--strategies", "ring", "--peers", "",
                 "--sections", "accuracy,time", "--budget-seconds", 0)  # fmt: skip
    assert result.returncode == 1  # what was not checked is not right
    assert "no accuracy check was made" in result.stdout
    assert "dropped for lack of time: section accuracy" in result.stdout
    assert "dropped for lack of time: section time" in result.stdout


def test_a_kernel_that_does_nothing_fails_the_run(tmp_path):
    result = run(*SMALL, "--lengths", 64, "--out", tmp_path, "--kernels", "cudnn", "--strategies",
                 "ring", "--peers", "", "--sections", "accuracy")  # fmt: skip
    assert result.returncode == 1
    table = (tmp_path / "table.md").read_text()
    assert "failed: ring [cudnn] refused everything" in table
    assert "cudnn runs on cuda" in table


def test_the_gate():
    exact = tuple(torch.zeros(4, dtype=torch.float64) for _ in range(4))
    flash = tuple(torch.full((4,), 1e-3) for _ in range(4))  # so 2.5e-3 + 2e-3 is allowed
    for error, passes in ((4.4e-3, True), (4.6e-3, False), (float("nan"), False)):
        results = [torch.zeros(4), torch.zeros(4), torch.tensor([0, 0, 0, error]), torch.zeros(4)]
        used, worst = compare(results, exact, flash)
        assert (used <= 1) == passes
        assert worst.startswith("dk ")


def test_refusing_everything_is_no_success():
    rows = [
        {"family": "ours", "name": "a", "state": "refused"},
        {"family": "ours", "name": "a", "state": "ok"},
        {"family": "ours", "name": "b", "state": "refused"},
        {"family": "peer", "name": "c", "state": "refused"},
    ]
    assert idle(rows) == ["b"]


def test_efficiency_is_the_median_of_quotients_within_rounds():
    def entry(contender, *times):
        return Entry(contender, None, [], rounds={"fwd": list(times)})

    # The clock falls by half from round to round: quotients do not notice, medians would.
    ours = entry(Ours("ring", "zigzag", "a"), 10, 20, 40)
    slow, fast = entry(OneGpu("a"), 16, 32, 64), entry(OneGpu("b"), 12, 24, 48)
    near = entry(OneGpu("a", local=True), 4, 8, 16)
    found = efficiencies(2, "fwd", ours, [slow, fast, near, ours])
    # 12 / 2 GPUs / 10 of the fastest; 16 / 2 / 10 of the same kernel; 4 * 2 / 10 of the local one.
    assert found == {"eff_best": 0.6, "eff_same": 0.8, "eff_local": 0.8}
    assert efficiencies(2, "fwd", ours, [ours])["eff_best"] is None


def test_long_calls_of_one_gpu_take_a_fraction_of_the_heads():
    problem = Problem(1 << 20, 32, 8, 128, "bf16")  # 63 s forward and backward at 500 TFLOP/s
    assert single_scale(problem, OneGpu("cudnn"), 100) == 1
    assert single_scale(problem, OneGpu("cudnn"), 20) == 4
    assert single_scale(problem, OneGpu("cudnn"), 1) == 8  # one KV head is the least
    assert single_scale(problem, OneGpu("cudnn", local=True), 1) == 1
    assert single_scale(problem, Ours("ring", "zigzag", "cudnn"), 1) == 1
    assert (repeats(0.1), repeats(10), repeats(4000)) == (10, 5, 1)


def test_exposed_transfers_are_those_beside_no_computation():
    events = [
        Event("attention", 7, 0, 100), Event("ncclSendRecv", 9, 50, 130),
        Event("Memcpy PtoP", 9, 140, 150), Event("merge", 7, 150, 170),
        Event("Memcpy DtoD", 7, 170, 180), Event("Memcpy DtoD", 9, 175, 200),
    ]  # fmt: skip
    # Copies on the busiest stream are work, on another they are transfers.
    assert exposed(events) == {
        "compute_ms": 0.13, "transfer_ms": 0.115, "exposed_ms": 0.06, "idle_ms": 0.01,
        "span_ms": 0.2,
    }  # fmt: skip
    assert exposed([])["span_ms"] == 0


def test_work_is_counted_by_pairs():
    bounds = cut_documents(96, 5, 4)
    assert len(bounds) == 6 and bounds[0] == 0 and bounds[-1] == 96
    assert all(b % 4 == 0 for b in bounds) and sorted(set(bounds)) == list(bounds)
    assert bounds == cut_documents(96, 5, 4)
    problem = Problem(96, 4, 2, 16, "bf16", window=7, cu_seqlens=bounds)
    starts = [max(b for b in bounds if b <= i) for i in range(96)]
    assert problem.pairs == sum(min(i - start + 1, 7) for i, start in enumerate(starts))
    assert Problem(96, 4, 2, 16, "bf16").pairs == 96 * 97 // 2
    assert problem.flops("fwd+bwd") == 3.5 * problem.flops("fwd") == 14 * 16 * 4 * problem.pairs
    with pytest.raises(ValueError, match="cannot be cut into 9 documents"):
        cut_documents(32, 9, 4)


@pytest.mark.parametrize("entry", ["ulysses", "rfa-zigzag", "rfa-stripe", "yunchang:2"])
def test_ranks_of_a_peer_hold_every_position_once(entry):
    for bounds in (None, (0, 16, 64)):
        problem = Problem(64, 4, 2, 16, "bf16", cu_seqlens=bounds)
        held = torch.cat([Peer(entry).positions(problem, rank, 4) for rank in range(4)])
        torch.testing.assert_close(held.sort().values, torch.arange(64))


def attention_in_fp64(q, k, v, dout, bounds_q, bounds_k):
    """out, dq, dk, dv of packed [tokens, h, d], causal from the end of each document."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in leaves[1:])
    scores = torch.einsum("qhd,khd->hqk", leaves[0], wide_k) / 4
    allowed = torch.zeros(scores.shape[1:], dtype=torch.bool)
    for (a, b), (c, d) in zip(bounds_q, bounds_k, strict=True):
        allowed[a:b, c:d] = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, wide_v)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.double())


def test_the_shim_computes_what_flash_attn_would():
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(20, 4, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(28, 2, 16, generator=generator) for _ in range(2))
    cu_q, cu_k = (torch.tensor(t, dtype=torch.int32) for t in ((0, 8, 20), (0, 12, 28)))
    lengths = (cu_q, cu_k, 12, 16)
    expected = attention_in_fp64(q, k, v, dout, [(0, 8), (8, 20)], [(0, 12), (12, 28)])
    out, lse, *_ = flash_attn_shim.varlen_forward(
        q, k, v, *lengths, softmax_scale=0.25, causal=True
    )
    grads = [torch.empty_like(t) for t in (q, k, v)]
    flash_attn_shim.varlen_backward(
        dout, q, k, v, out, lse, *grads, *lengths, softmax_scale=0.25, causal=True
    )
    for got, want in zip((out, *grads), expected, strict=True):
        # fp32 against fp64, sums of tens of terms of order 1.
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_the_shim_takes_batches_as_well():
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(20, 4, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(20, 2, 16, generator=generator) for _ in range(2))
    expected = attention_in_fp64(q, k, v, dout, [(0, 20)], [(0, 20)])
    out, lse, *_ = flash_attn_shim.forward(
        *(t[None] for t in (q, k, v)), softmax_scale=0.25, causal=True
    )
    grads = [torch.empty_like(t[None]) for t in (q, k, v)]
    flash_attn_shim.backward(
        *(t[None] for t in (dout, q, k, v)), out, lse, *grads, softmax_scale=0.25, causal=True
    )
    for got, want in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(got[0].double(), want, rtol=0, atol=1e-5)  # as above
