"""What is measured again and again: a section is a function of a work directory, giving values."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load_check.record import ROOT, Stopwatch, environment
from surgery_bench.measure import run

ROUNDS = 3


@dataclass(frozen=True)
class Value:
    """A figure and how far it may be off.

    Attributes:
        tolerance: as a share of what is recorded.
        floor: an error below it is none, whatever was recorded.
    """

    value: float
    unit: str
    tolerance: float
    is_speed: bool = True
    more_is_better: bool = False
    floor: float = 0.0

    def limit(self, recorded: float) -> float:
        """The worst that is no regression."""
        share = 1 - self.tolerance if self.more_is_better else 1 + self.tolerance
        return max(self.floor, recorded * share)

    def is_worse_than(self, limit: float) -> bool:
        """Whether it lies on the wrong side; what is not a number always does."""
        return not (self.value >= limit if self.more_is_better else self.value <= limit)

    def text(self) -> str:
        return f"{self.value:.4g} {self.unit}".strip()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def error(value: float, floor: float) -> Value:
    """A figure of exactness: the same on every machine but for rounding."""
    return Value(value, "", 0.1, is_speed=False, floor=floor)


def cpu_seconds(value: float, tolerance: float = 0.25) -> Value:
    return Value(round(value, 3), "CPU s", tolerance)


def ring(work: Path) -> dict[str, Value]:
    """Ring attention on two ranks against fp64, in bf16, beside one call of torch's kernel."""
    import ring_error

    options = Namespace(length=256, heads=4, kv_heads=2, head_dim=32, dtype="bfloat16")
    inputs = ring_error.make_inputs(options)
    expected = ring_error.exact(*inputs)
    found = ring_error.errors(ring_error.on_ranks(2, "ring", "zigzag", options), expected)
    return {f"ring, relative error of {name}": error(value, floor=1e-4)
            for name, value in zip(ring_error.NAMES, found, strict=True)}


def rope(work: Path) -> dict[str, Value]:
    """Frequencies of every scaled kind against transformers' own functions, run in fp64."""
    import torch
    from transformers import LlamaConfig, modeling_rope_utils

    from extend.model_config import RopeSpec, write_rope
    from extend.rope import frequencies
    from tests.rope.families import DoubleTorch

    raw = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2,
           "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default",
                                                                "rope_theta": 5e5}}
    kinds = {"linear": {}, "yarn": {"original_max_position_embeddings": 4096},
             "llama3": {"original_max_position_embeddings": 4096, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0}}
    plain, before, values = modeling_rope_utils.torch, torch.get_default_dtype(), {}
    modeling_rope_utils.torch = DoubleTorch()
    torch.set_default_dtype(torch.float64)
    try:
        for kind, extra in kinds.items():
            spec = RopeSpec(rope_theta=5e5, rotary_dim=32, original_len=4096,
                            scaling={"rope_type": kind, "factor": 8.0, **extra})
            config = LlamaConfig.from_dict(write_rope(raw, spec, 8 * 4096))
            expected, _ = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
            found = frequencies.inv_freq(spec, None)
            values[f"rope, relative error of {kind}"] = error(
                float(((found - expected) / expected).abs().max()), floor=1e-12)
    finally:
        modeling_rope_utils.torch = plain
        torch.set_default_dtype(before)
    return values


def surgery(work: Path) -> dict[str, Value]:
    """Extraction at rank 16 and a merge, of four layers of SmolLM2's shape."""
    from dataclasses import replace

    from surgery_bench.shapes import SHAPES, make_models

    from extend.model_config import read_json

    shape = replace(SHAPES["smollm2"], layers=4)
    make_models(shape, work, device="cpu", max_shard_bytes=5_000_000_000)
    base, tuned, target = (str(work / role) for role in ("base", "tuned", "target"))
    extract = _best(lambda i: _extend(work, "extract", "--base", base, "--tuned", tuned, "--rank",
                                      "16", "--out", str(work / f"adapter-{i}")))
    merge = _best(lambda i: _extend(work, "merge", "--adapter", str(work / "adapter-0"),
                                    "--target", target, "--out", str(work / f"merged-{i}")))
    copy = _best(lambda i: _run([sys.executable, str(ROOT / "scripts/surgery_bench/plain_io.py"),
                                 "copy", "1", target, str(work / f"copy-{i}")], work))
    results = read_json(work / "adapter-0" / "manifest.json")["results"]
    return {"extraction, mean residual": error(results["mean_residual"], floor=0.0),
            "extraction": cpu_seconds(extract), "merge": cpu_seconds(merge),
            "merge over copying": Value(round(merge / copy, 2), "times", 0.4)}


def train(work: Path) -> dict[str, Value]:
    """Tokens a second of CPU, and the last loss, of 40 tiny steps."""
    from tiny_model import save_text, save_tiny_model

    from extend.curves import METRICS_NAME

    save_tiny_model(work / "base", "llama", native_len=64, rope_theta=1e4)
    save_text(work / "text.jsonl", documents=100, lines=8)
    recipe = work / "recipe.yaml"
    recipe.write_text(
        "name: tiny\nseed: 1\nstages:\n  - name: long\n    stage: train\n    model: base\n"
        "    nproc: 1\n    loss_chunk: 64\n    schedule: [{length: 64, steps: 40, batch_rows: 2, "
        "lr: 1e-3}]\n    data: [{kind: text, path: text.jsonl}]\n", encoding="utf-8")
    seconds = _best(lambda i: _extend(work, "train", str(recipe), "--out", str(work / f"out-{i}")),
                    rounds=2)
    lines = (work / "out-0" / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    return {"training, loss after 40 steps": Value(json.loads(lines[-1])["loss"], "nats", 1e-3,
                                                   is_speed=False),
            "training, start and 40 steps": cpu_seconds(seconds),
            "training, tokens a CPU second": Value(round(40 * 2 * 64 / seconds, 1), "", 0.25,
                                                   more_is_better=True)}


def evaluation(work: Path) -> dict[str, Value]:
    """60 passkey prompts of 320 tokens, of a tiny random model."""
    from tiny_model import save_tiny_model

    save_tiny_model(work / "base", "llama", native_len=64, rope_theta=1e4)
    return {"evaluation of 60 prompts": cpu_seconds(_best(lambda i: _extend(
        work, "eval", str(work / "base"), "--tasks", "passkey", "--lengths", "320", "--depths",
        "10", "--trials", "6", "--out", str(work / f"out-{i}")), rounds=2))}


def help_time(work: Path) -> dict[str, Value]:
    """`extend --help`, which must not import torch."""
    return {"extend --help": cpu_seconds(_best(lambda _: _extend(work, "--help"), rounds=5))}


def suite(work: Path) -> dict[str, Value]:
    """The tests, one after another, and that they pass."""
    watch = Stopwatch()
    done = _run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(ROOT / "tests")], work)
    return {"tests": cpu_seconds(done, 0.15),
            "tests, wall": Value(watch.seconds(), "s", 0.5)}


def gpu(work: Path) -> dict[str, Value]:
    """Attention of the GPU's kernel against fp64 and the tokens a second of a small training."""
    import torch

    if not torch.cuda.is_available():
        return {}
    import ring_error

    options = Namespace(length=2048, heads=8, kv_heads=2, head_dim=64, dtype="bfloat16")
    inputs = ring_error.make_inputs(options)
    found = ring_error.one_call(*(t.cuda() for t in inputs))
    errors = ring_error.errors([t.cpu() for t in found], ring_error.exact(*inputs))
    values = {f"GPU, relative error of {name}": error(value, floor=1e-4)
              for name, value in zip(ring_error.NAMES, errors, strict=True)}
    return values | {f"GPU, {name}": value for name, value in train(work).items()}


SECTIONS: dict[str, Callable[[Path], dict[str, Value]]] = {
    "rope": rope, "ring": ring, "surgery": surgery, "train": train, "evaluation": evaluation,
    "help": help_time, "suite": suite, "gpu": gpu}


def _best(work: Callable[[int], float], rounds: int = ROUNDS) -> float:
    return min(work(number) for number in range(rounds))


def _extend(work: Path, *arguments: str) -> float:
    return _run([sys.executable, "-m", "extend", *arguments], work)


def _run(command: Sequence[str], work: Path) -> float:
    """CPU seconds of a command, which must end well."""
    row = run(command, work / "log.txt", environment=environment(EXTEND_CACHE=str(work / "cache")))
    if row["exit_code"] != 0:
        said = (work / "log.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{' '.join(command)}: exit code {row['exit_code']}:\n{said[-2000:]}")
    return row["cpu_seconds"]
