#!/usr/bin/env python3
"""Time and check ring attention beside other implementations and one GPU alone, on any machine.

    torchrun --nproc_per_node 8 scripts/bench_ring.py --out runs/ring         # everything
    torchrun --nproc_per_node 2 scripts/bench_ring.py --sections accuracy     # only the checks
    torchrun --nproc_per_node 8 scripts/bench_ring.py --per-gpu 8192,32768,131072 \\
        --strategies ring,ring/contiguous,ring/striped,all-gather,ulysses,usp:2,usp:4,double-ring:2
    python scripts/bench_ring.py --plot runs/ring/ring.json                   # later, without GPUs

Sections: memory (peak bytes of a call), accuracy (out, dq, dk, dv against fp64; exit code 1 if any
case fails or none ran), time (dense), packed (--documents documents), window (--window tokens),
calibrate (rates and links for the cost model, and its predictions) and profile (what waits for
whom; Chrome traces). Shape: --heads 32 --kv-heads 8 --head-dim 128 --dtype bf16, causal, batch 1,
as in Llama-3.1-8B.

Writes ring.json and table.md into --out after every section, and plot.png at the end where
matplotlib is installed. Peers that are not installed come from wheels in --peers-folder (`pip
download --no-deps ring-flash-attn yunchang`). What does not run is listed with its reason, and
what --budget-seconds leaves no time for is listed as dropped. On a CPU (--device cpu, or no GPU)
the same code runs on gloo; its times mean nothing.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from ring_bench.report import markdown, plot

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("memory", "accuracy", "time", "packed", "window", "calibrate", "profile")
WEIGHTS = {"memory": 0.5, "accuracy": 2, "time": 4, "packed": 1, "window": 1, "calibrate": 0.5,
           "profile": 0.5}  # fmt: skip  # parts of the budget
LENGTHS = {"cuda": "16384,32768,65536,131072", "cpu": "256"}
KERNELS = {"cuda": ("cudnn", "fa4"), "cpu": ("flash_cpu",)}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def head_layouts(text: str) -> list[tuple[int, int]]:
    """`32:8,9:3` as pairs of query and KV heads."""
    pairs = [entry.split(":") for entry in text.split(",")]
    return [(int(heads), int(kv_heads)) for heads, kv_heads in pairs]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sections", default=",".join(s for s in SECTIONS if s != "profile"))
    add("--lengths", type=numbers, help="tokens of the whole sequence; default by device")
    add("--per-gpu", type=numbers, help="tokens a GPU, instead of --lengths")
    add("--strategies", help="strategy[/layout],...; zigzag without layout; default: all that fit")
    add("--kernels", help="names in extend.ring.KERNELS; default by device")
    add("--peers", help="see scripts/ring_bench/peers.py; '' for none; default: all")
    add("--peers-folder", type=Path, help="a folder of peers' wheels to import from")
    add("--rounds", type=int, default=5, help="how often everybody is timed")
    add("--budget-seconds", type=float, default=540, help="spend no more than about this")
    add("--largest-single-seconds", type=float, default=5.0,
        help="one GPU gets a fraction of the heads where a call would take longer")  # fmt: skip
    for name, default in (("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("documents", 16),
                          ("window", 4096), ("accuracy-rows", 256)):  # fmt: skip
        add(f"--{name}", type=int, default=default)
    add("--mask-length", type=int, help="tokens of packed and window; default 131072")
    add("--accuracy-head-dims", type=numbers, default=[64, 96, 128, 256])
    add("--accuracy-heads", type=head_layouts, default=[(32, 8), (9, 3)])
    add("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    add("--device", choices=["cuda", "cpu"])
    add("--commit", help="default: what git says")
    add("--out", type=Path, default=Path("runs/ring"))
    add("--plot", type=Path, help="write table.md and plot.png beside this ring.json, no more")
    options = parser.parse_args(arguments)
    unknown = set(options.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: no {', '.join(sorted(unknown))}; choose of {','.join(SECTIONS)}")
    return options


def complete(options: argparse.Namespace, world: int) -> None:
    """Fill in the defaults that depend on the device and the number of GPUs."""
    if options.per_gpu:
        options.lengths = [rows * world for rows in options.per_gpu]
    options.lengths = sorted(options.lengths or numbers(LENGTHS[options.device]))
    options.kernels = options.kernels or ",".join(default_kernels(options))
    options.strategies = options.strategies or ",".join(all_strategies(world))
    if options.mask_length is None:
        options.mask_length = 131072 if options.device == "cuda" else options.lengths[-1]


def default_kernels(options: argparse.Namespace) -> list[str]:
    """The fast kernels that take the timed shape on this machine."""
    from ring_bench.problems import Problem

    from extend.ring.kernels import KERNELS as installed

    problem = Problem(8, options.heads, options.kv_heads, options.head_dim, options.dtype)
    q, k, *_ = problem.tensors(8, options.device)
    names = [name for name in KERNELS[options.device] if name in installed]
    return [name for name in names if installed[name].refuse(q, k) is None]


def all_strategies(world: int) -> list[str]:
    """The ring in every layout, and every other strategy in several degrees."""
    names = ["ring", "ring/contiguous", "ring/striped", "all-gather", "ulysses", "auto"]
    names += [f"usp:{degree}" for degree in (2, 4) if 2 * degree <= world and not world % degree]
    return names + (["double-ring:2"] if world >= 4 and world % 2 == 0 else [])


class Bench:
    """One run: its contenders, its sections and what they found."""

    def __init__(self, options: argparse.Namespace):
        from ring_bench import contenders, peers, session

        warnings.simplefilter("ignore", FutureWarning)  # of peers
        self.options = options
        self.session = session.Session(options.device, options.budget_seconds)
        complete(options, self.session.world)
        wheels = peers.add_wheels(options.peers_folder)
        self.kernels = options.kernels.split(",")
        self.ours = contenders.parse_ours(options.strategies, options.kernels)
        default = peers.DEFAULT_PEERS
        self.peers = peers.parse_peers(default if options.peers is None else options.peers)
        single = dict.fromkeys([*self.kernels, *(peer.kernel for peer in self.peers)])
        self.alone = [contenders.OneGpu(kernel) for kernel in single]
        self.local = [contenders.OneGpu(kernel, local=True) for kernel in single]
        self.result = {**describe(options, self.session), "peer_wheels": wheels, "dropped": []}

    def run(self) -> int:
        """All sections in turn; the exit code."""
        wanted = [name for name in SECTIONS if name in self.options.sections.split(",")]
        for number, name in enumerate(wanted):
            left = self.session.left()
            if left <= 0:
                self.drop(f"section {name}")
                continue
            seconds = left * WEIGHTS[name] / sum(WEIGHTS[later] for later in wanted[number:])
            self.session.say(f"{name}: {seconds:.0f} of {left:.0f} s")
            getattr(self, name)(seconds)
            self.write(is_last=number == len(wanted) - 1)
        problem = self.verdict() if "accuracy" in wanted else None
        self.session.say(problem or "done")
        self.session.close()
        return 1 if problem else 0

    def verdict(self) -> str | None:
        """What is wrong with section accuracy, if anything is."""
        found = self.result.get("accuracy", {"rows": [], "failed": 0})
        if found["failed"]:
            return f"{found['failed']} accuracy checks failed"
        passed = any(row["state"] == "ok" and row["family"] == "ours" for row in found["rows"])
        return None if passed else "no accuracy check was made"

    def drop(self, what: str) -> None:
        self.result["dropped"].append(what)
        self.session.say(f"dropped for lack of time: {what}")

    def problem(self, seq_len: int, **mask: Any) -> Any:
        from ring_bench.problems import Problem

        o = self.options
        return Problem(seq_len, o.heads, o.kv_heads, o.head_dim, o.dtype, **mask)

    def masked(self, section: str) -> Any:
        """The problem of section packed or window."""
        from ring_bench.problems import cut_documents

        length = self.options.mask_length
        if section == "window":
            return self.problem(length, window=self.options.window)
        bounds = cut_documents(length, self.options.documents, 2 * self.session.world)
        return self.problem(length, cu_seqlens=bounds)

    def accuracy(self, seconds: float) -> None:
        from ring_bench.accuracy import run_accuracy

        found = run_accuracy(self.session, self.ours, self.peers, self.options, seconds)
        self.result["accuracy"] = found
        if found["dropped"]:
            self.drop(f"{found['dropped']} of {found['cases']} accuracy cases")

    def time(self, seconds: float) -> None:
        problems = [self.problem(length) for length in self.options.lengths]
        self.result["time"] = self.time_all(problems, seconds)

    def packed(self, seconds: float) -> None:
        self.result["packed"] = self.time_all([self.masked("packed")], seconds)

    def window(self, seconds: float) -> None:
        self.result["window"] = self.time_all([self.masked("window")], seconds)

    def time_all(self, problems: list[Any], seconds: float) -> list[dict[str, Any]]:
        """Each problem's part of the time grows with its work; what one leaves goes to the next.

        None has less than half of an even part: first calls take seconds, however short the rows.
        """
        from ring_bench.timing import time_problem

        end, groups = self.session.left() - seconds, []
        for number, problem in enumerate(problems):
            weights = [p.flops("fwd+bwd") + 1e15 for p in problems[number:]]
            part = (self.session.left() - end) * max(weights[0] / sum(weights), 0.5 / len(weights))
            who = [*self.alone, *(self.local if problem.mask == "dense" else []), *self.ours,
                   *self.peers]  # fmt: skip
            group = time_problem(self.session, problem, who, self.options.rounds, part,
                                 self.options.largest_single_seconds)  # fmt: skip
            groups.append(group)
            what = f"{problem.mask}, {problem.seq_len} tokens"
            self.session.say(f"  {what}: {group['rounds']} rounds")
            if group["rounds"] < self.options.rounds:
                missing = self.options.rounds - group["rounds"]
                self.drop(f"{missing} of {self.options.rounds} rounds of {what}")
        return groups

    def memory(self, seconds: float) -> None:
        from ring_bench.memory import measure_memory

        end, rows = self.session.left() - seconds, []
        problems = [self.problem(length) for length in self.options.lengths]
        cases = [(c, p) for c in self.ours for p in problems if c.kernel == self.kernels[0]]
        for contender, problem in cases:
            if self.session.left() < end:
                self.drop(f"{len(cases) - len(rows)} of {len(cases)} memory cases")
                break
            rows.append(measure_memory(self.session, problem, contender))
        self.result["memory"] = rows

    def calibrate(self, seconds: float) -> None:
        from ring_bench.calibrate import calibrate, compare_predictions

        o = self.options
        lengths = [4096, 8192, 16384, 32768] if o.device == "cuda" else [64, 128]
        found = calibrate(self.session, self.problem(lengths[0]), self.kernels, lengths)
        shape = {"heads": o.heads, "kv_heads": o.kv_heads, "head_dim": o.head_dim}
        timed = self.result.get("time", [])
        found["predictions"] = compare_predictions(
            timed, found["kernels"], shape, self.session.world
        )
        self.result["calibration"] = found

    def profile(self, seconds: float) -> None:
        from ring_bench.memory import profile

        end, rows = self.session.left() - seconds, []
        problem = self.problem(self.options.lengths[0])
        who = [*self.ours, *self.peers]
        for contender in who:
            if self.session.left() < end:
                self.drop(f"{len(who) - len(rows)} of {len(who)} profiles")
                break
            folder = self.options.out / "traces"
            rows.append(profile(self.session, problem, contender, folder))
        self.result["profile"] = rows

    def write(self, is_last: bool) -> None:
        if self.session.rank == 0:
            self.options.out.mkdir(parents=True, exist_ok=True)
            path = self.options.out / "ring.json"
            path.write_text(json.dumps(self.result, indent=1) + "\n")
            write_report(path, with_plot=is_last)


def describe(options: argparse.Namespace, session: Any) -> dict[str, Any]:
    """Where, when and with what this was run."""
    import torch

    gpu, libraries = "CPU", "gloo"
    if session.is_cuda:
        gpu = torch.cuda.get_device_name()
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return {
        "command": f"torchrun --nproc_per_node {session.world} {shlex.join(sys.argv)}",
        "world": session.world, "gpu": gpu, "torch": torch.__version__, "libraries": libraries,
        "commit": options.commit or git_commit(), "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "shape": f"{options.heads}:{options.kv_heads} heads, head_dim {options.head_dim}, "
        f"{options.dtype}",
    }  # fmt: skip


def git_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_report(path: Path, with_plot: bool = True) -> None:
    """table.md and, with matplotlib, plot.png beside a ring.json."""
    result = json.loads(path.read_text())
    path.with_name("table.md").write_text(markdown(result))
    if with_plot and importlib.util.find_spec("matplotlib") and result.get("time"):
        plot(result, path.with_name("plot.png"))


def main() -> int:
    options = parse()
    if options.plot:
        write_report(options.plot)
        return 0
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return Bench(options).run()


if __name__ == "__main__":
    sys.exit(main())
