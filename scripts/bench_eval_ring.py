#!/usr/bin/env python3
"""Time the prefill of one long row on one GPU and on several, beside the attention alone.

    python scripts/bench_eval_ring.py --out runs/eval-ring          # 1M tokens, on 1 and on 2 GPUs
    python scripts/bench_eval_ring.py --gpus 4 --length 524288
    python scripts/bench_eval_ring.py --tiny --out /tmp/tiny        # on a CPU; times mean nothing

The model has SmolLM2-135M's shape and random weights in bf16. Measured, in one run:

    floor    attention alone: one causal call of the whole length on one GPU, for each kernel that
             takes it, times the number of layers; the fastest is the floor
    one      prefill by the backend `local` on one GPU, the others idle
    ring     prefill by the backend `ring` on all GPUs, until the slowest has finished
    decode   one new token on top of the whole row, on all GPUs

`one` and `ring` take turns, --rounds times each; the first round compiles what its shapes need, and
the best round of each counts. Exit code 1 if the hidden states of the last token and of one new
token differ between them; before the rounds a shorter row in fp32 is compared more strictly.
Writes eval_ring.json and table.md into --out after every step.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, not installed

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
# Relative, of hidden states. fp32: sums in another order; without some of the keys it is 1e-3 and
# more. bf16 keeps 8 bits, and the ring rounds partial results that one call would not.
MOST_DIFFERENCE = {"bfloat16": 0.05, "float32": 1e-4}
CHECKED = 8192  # tokens of the row that is compared in fp32


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--length", type=int, help="tokens; default 1048576")
    add("--chunk", type=int, help="most tokens of a GPU in one forward; default 131072")
    add("--gpus", type=int, default=2)
    add("--rounds", type=int, default=2)
    add("--new-tokens", type=int, default=8, help="how many are decoded")
    add("--tiny", action="store_true", help="a tiny model on the CPU, to test this script")
    add("--commit", help="default: what git says")
    add("--out", type=Path, default=Path("runs/eval-ring"))
    options = parser.parse_args(arguments)
    small, large = (512, 64), (1 << 20, 1 << 17)
    length, chunk = small if options.tiny else large
    options.length = length if options.length is None else options.length
    options.chunk = chunk if options.chunk is None else options.chunk
    for name in ("length", "chunk", "rounds", "new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.gpus < 2:
        parser.error("--gpus must be at least 2: one is measured anyway")
    options.device = "cpu" if options.tiny else "cuda"
    options.dtype = "float32" if options.tiny else "bfloat16"
    options.command = shlex.join(["scripts/bench_eval_ring.py",
                                  *(sys.argv[1:] if arguments is None else arguments)])
    options.commit = options.commit or git_commit()
    return options


def git_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Bench:
    """What one process does."""

    def __init__(self, options: argparse.Namespace, rank: int):
        import torch

        from extend.ring.comm import RingComm

        self.options, self.rank = options, rank
        self.is_cuda = options.device == "cuda"
        self.device = torch.device("cuda", rank) if self.is_cuda else torch.device("cpu")
        self.comm = RingComm()
        self.model = make_model(options, self.device)
        self.ids = torch.randint(self.model.config.vocab_size, (options.length,),
                                 generator=torch.Generator().manual_seed(1))
        self.result = describe(options, self.comm)
        self._turn = 0

    def run(self) -> None:
        """Everything in turn; rank 0 writes."""
        self.result["difference_fp32"] = self.check()
        self.alone(lambda: self.result.update(floor=self.floor()))
        self.write()
        rounds = self.result["rounds"] = []
        for number in range(self.options.rounds):
            found: dict[str, Any] = {}
            rows = self.ids, self.options.chunk
            self.alone(lambda found=found, rows=rows: found.update(one=self.one(*rows)))
            found["ring"] = self.ring(*rows)
            found["difference"] = self.compare()
            rounds.append(found)
            if self.rank:
                continue
            self.summarize()
            self.write()
            self.say(f"round {number + 1} of {self.options.rounds}: one GPU "
                     f"{found['one']['seconds']:.2f} s, {self.comm.world} GPUs "
                     f"{found['ring']['seconds']:.2f} s")

    def check(self) -> float:
        """How far the backends are apart on a shorter row of many parts, in fp32."""
        import torch

        ids = self.ids[:CHECKED]
        rows = ids, max(1, len(ids) // 16)
        self.model.float()
        self.alone(lambda: self.one(*rows))
        self.ring(*rows)
        self.model.to(getattr(torch, self.options.dtype))  # the same weights as before
        return self.compare()

    def alone(self, work: Callable[[], object]) -> None:
        """Let rank 0 work while the others wait on the host, so that their GPUs are idle."""
        if self.rank == 0:
            work()
        self.meet()

    def meet(self) -> None:
        from extend.ring.agreement import agree

        self.synchronize()
        self._turn += 1
        agree(self.comm, "bench", turn=self._turn)

    def floor(self) -> dict[str, Any]:
        """Seconds of attention alone in one layer, by kernel, and of the fastest in all layers."""
        import torch

        from extend.ring.kernels import KERNELS
        from extend.ring.kernels.choose import CANDIDATES
        from extend.ring.mask import CAUSAL

        config, dtype = self.model.config, self.model.dtype
        heads = config.num_attention_heads, *[config.num_key_value_heads] * 2
        q, k, v = (torch.randn(1, self.options.length, count, config.head_dim, dtype=dtype,
                               device=self.device).transpose(1, 2) for count in heads)
        refused = {name: KERNELS[name].refuse(q, k) for name in CANDIDATES[self.device.type]}
        takers = [name for name, why in refused.items() if why is None]
        seconds: dict[str, float] = {}
        for name in [name for name in takers if name != "efficient"] or takers:  # far slower
            def call(name: str = name) -> None:
                KERNELS[name].forward(q, k, v, mask=CAUSAL, softmax_scale=config.head_dim**-0.5)

            try:
                call()  # compiles
                seconds[name] = min(self.clock(call) for _ in range(2))
            except RuntimeError as error:  # of a length that it cannot take
                refused[name] = f"fails here ({str(error).splitlines()[0][:200]})"
                continue
            self.say(f"floor: {name} {seconds[name]:.3f} s a layer")
        fastest = min(seconds, key=seconds.get)
        layers = config.num_hidden_layers
        return {"seconds_a_layer": seconds, "fastest": fastest, "layers": layers,
                "seconds": layers * seconds[fastest],
                "not_taken": {name: why for name, why in refused.items() if why}}

    def one(self, ids: Any, chunk: int) -> dict[str, Any]:
        """Prefill on one GPU by the backend `local`."""
        from transformers import DynamicCache

        from extend.evaluate.attention import register_prefill_attention
        from extend.evaluate.forward import hidden_parts

        self.model.set_attn_implementation(register_prefill_attention())
        cache, last = DynamicCache(config=self.model.config), []

        def read(ids: Any) -> None:
            for _, hidden in hidden_parts(self.model, ids, chunk=chunk, cache=cache):
                state = hidden[-1].clone()
            last.append(state)

        self.forget()
        seconds = self.clock(lambda: read(ids))
        read([1])
        self._states_of_one = last
        return {"seconds": seconds, "peak_gib": self.peak_gib()}

    def ring(self, ids: Any, chunk: int) -> dict[str, Any]:
        """Prefill on all GPUs by the backend `ring`, and new tokens on top of it."""
        import torch
        import torch.distributed as dist

        from extend.evaluate.backends.ring import RingBackend

        backend = RingBackend(self.model, None, chunk=chunk)
        reader = backend.reader(len(ids), asked=1 + self.options.new_tokens)
        last = torch.zeros(self.model.config.hidden_size, device=self.device,
                           dtype=self.model.dtype)

        def prefill() -> None:
            for positions, hidden in reader.read(ids):
                if len(positions) and positions[-1] == len(ids) - 1:
                    last.copy_(hidden[-1])

        def decode() -> None:
            for _ in range(self.options.new_tokens):
                token = self.model.lm_head(reader.ask([1])).argmax(dim=-1)
                int(token)  # as generation does: the next token is looked at

        self.forget()
        self.meet()
        seconds = self.slowest(self.clock(prefill))
        asked = reader.ask([1])[-1]
        each = self.slowest(self.clock(decode)) / self.options.new_tokens
        dist.all_reduce(last)  # of the rank that has it and zeros
        self._states_of_ring = [last, asked]
        return {"seconds": seconds, "peak_gib": self.slowest(self.peak_gib()),
                "decode_seconds": each}

    def compare(self) -> float:
        """How far hidden states are apart, relative: the row's last, and one token later."""
        if self.rank:
            return math.nan  # it has read nothing by itself
        return max(float((one.double() - ring.double()).norm() / one.double().norm())
                   for one, ring in zip(self._states_of_one, self._states_of_ring, strict=True))

    def summarize(self) -> None:
        """The figures that the goals are about, from the best rounds so far."""
        rounds, floor = self.result["rounds"], self.result["floor"]
        one = min(found["one"]["seconds"] for found in rounds)
        ring = min(found["ring"]["seconds"] for found in rounds)
        self.result |= {
            "one_seconds": one, "ring_seconds": ring, "speedup": one / ring,
            "one_over_floor": one / floor["seconds"],
            "ring_over_floor": ring / (floor["seconds"] / self.comm.world),
            "decode_seconds": min(found["ring"]["decode_seconds"] for found in rounds),
            "difference": max(found["difference"] for found in rounds)}

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds of `work` on this process's device."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def slowest(self, value: float) -> float:
        import torch
        import torch.distributed as dist

        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def synchronize(self) -> None:
        import torch

        if self.is_cuda:
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give memory of what came before back, and count its peak from here."""
        import torch

        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if self.is_cuda else 0.0

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def write(self) -> None:
        if self.rank == 0:
            self.options.out.mkdir(parents=True, exist_ok=True)
            (self.options.out / "eval_ring.json").write_text(
                json.dumps(self.result, indent=1) + "\n")
            (self.options.out / "table.md").write_text(table(self.result))


def make_model(options: argparse.Namespace, device: Any) -> Any:
    """Random weights, the same on every rank."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from extend.evaluate.attention import register_prefill_attention

    config = LlamaConfig(**(TINY if options.tiny else SHAPE), tie_word_embeddings=True,
                         max_position_embeddings=options.length + options.new_tokens + 1,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e7})
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, options.dtype),
                                          attn_implementation=register_prefill_attention())
    return model.to(device).eval()


def describe(options: argparse.Namespace, comm: Any) -> dict[str, Any]:
    """Where, when and with what this is run. Collective."""
    import torch
    import transformers

    is_cuda = options.device == "cuda"
    libraries = "gloo"
    if is_cuda:
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return {
        "command": options.command, "commit": options.commit,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "gpu": torch.cuda.get_device_name() if is_cuda else "CPU", "world": comm.world,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "libraries": libraries, "transport": comm.transport if is_cuda else "p2p",
        "shape": TINY if options.tiny else SHAPE, "dtype": options.dtype,
        "length": options.length, "chunk": options.chunk}


def table(result: dict[str, Any]) -> str:
    """What was found, for people."""
    lines = [f"`{result['command']}`, commit {result['commit']}, {result['date']}: "
             f"{result['world']} x {result['gpu']}, torch {result['torch']}, "
             f"{result['libraries']}, transport {result['transport']}", "",
             f"{result['length']} tokens, parts of {result['chunk']} a GPU, {result['dtype']}", "",
             "| what | seconds | against |", "|---|---|---|"]
    floor, world = result.get("floor"), result["world"]
    if floor:
        lines += [f"| attention alone, {name}, {floor['layers']} layers | "
                  f"{floor['layers'] * seconds:.2f} | |"
                  for name, seconds in floor["seconds_a_layer"].items()]
    if "speedup" in result:
        lines += [
            f"| prefill, 1 GPU | {result['one_seconds']:.2f} | "
            f"{result['one_over_floor']:.2f} x the floor |",
            f"| prefill, {world} GPUs | {result['ring_seconds']:.2f} | "
            f"{result['speedup']:.2f} x as fast as 1 GPU, {result['ring_over_floor']:.2f} x the "
            f"floor / {world} |",
            f"| one new token, {world} GPUs | {result['decode_seconds']:.4f} | |", "",
            f"Difference of hidden states in fp32: {result['difference_fp32']:.1e}", "",
            "| round | 1 GPU | GiB | ring | GiB a GPU | difference |", "|---|---|---|---|---|---|"]
        lines += [f"| {i} | {r['one']['seconds']:.2f} | {r['one']['peak_gib']:.1f} | "
                  f"{r['ring']['seconds']:.2f} | {r['ring']['peak_gib']:.1f} | "
                  f"{r['difference']:.1e} |" for i, r in enumerate(result["rounds"], start=1)]
    return "\n".join(lines) + "\n"


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    """One process of the run."""
    import torch

    from extend.evaluate.ring_workers import join_local

    try:
        with torch.inference_mode(), join_local(rank, options.gpus, port, options.device):
            Bench(options, rank).run()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at a regular end NCCL might wait for ranks that wait for this one


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch
    import torch.distributed as dist
    from torch import multiprocessing

    if not options.tiny and torch.cuda.device_count() < options.gpus:
        print(f"--gpus is {options.gpus}, but torch sees {torch.cuda.device_count()} CUDA devices",
              file=sys.stderr)
        return 2
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    multiprocessing.start_processes(work, (store.port, options), nprocs=options.gpus,
                                    start_method="forkserver")
    print((options.out / "table.md").read_text())
    problem = verdict(json.loads((options.out / "eval_ring.json").read_text()))
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


def verdict(result: dict[str, Any]) -> str | None:
    """What is wrong with the results, if anything is."""
    for name, dtype in (("difference_fp32", "float32"), ("difference", result["dtype"])):
        most = MOST_DIFFERENCE[dtype]
        if not result[name] <= most:  # as NaN is not
            return (f"{name}: hidden states on 1 and on {result['world']} GPUs differ by "
                    f"{result[name]:.1e} of their length, more than {most:.0e}")
    return None


if __name__ == "__main__":
    sys.exit(main())
