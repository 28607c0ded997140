#!/usr/bin/env python3
"""Train the same model on the same rows with linear layers in bf16 and in float8; compare losses.

    python scripts/fp8_loss.py --text data/text/train --out runs/fp8             # random weights
    python scripts/fp8_loss.py --text data/text/train --model data/smollm2-135m-instruct \
        --lr 1e-4 --out runs/fp8-smollm2

Runs `extend train` once for each of --linear, in this process, with fp32 weights and bf16 compute.
Writes losses.json (every loss, seconds a step, the differences) and losses.png after each run.
Without a GPU products in float8 are emulated: for a look at what it does, not at its speed. Needs
the extra `torchao`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, not installed

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from extend.option_types import parse_length  # noqa: E402
from extend.train import train  # noqa: E402
from extend.train_options import TrainOptions  # noqa: E402

SHAPES = {"tiny": (64, 128, 2), "135m": (768, 2048, 18), "400m": (1024, 4096, 24),
          "1b": (2048, 5632, 22)}  # width, width of MLPs, layers
END = "<|end|>"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="file or directory of text to train on")
    add("--model", type=Path, help="checkpoint to start from; none starts from random weights")
    add("--shape", choices=SHAPES, default="400m", help="of a model with random weights")
    add("--linear", default="compute,float8,float8-rowwise", help="linear_dtype of each run")
    add("--length", type=parse_length, default=2048)
    add("--rows", type=int, default=8, help="rows a step")
    add("--steps", type=int, default=100)
    add("--lr", type=float, default=3e-4)
    add("--seed", type=int, default=0)
    add("--commit", default="")
    add("--out", type=Path, required=True)
    return parser.parse_args()


def make_model(directory: Path, shape: str, length: int, seed: int) -> Path:
    """A Llama with random weights that reads bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={END: 0} | {c: i for i, c in enumerate(alphabet, 1)},
                                   merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(directory)
    width, inner, layers = SHAPES[shape]
    heads = max(2, width // 64)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=272, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, eos_token_id=0, bos_token_id=0,
        max_position_embeddings=length)).save_pretrained(directory)
    return directory


def run(args: argparse.Namespace, model: Path, linear: str, out: Path) -> dict[str, Any]:
    """Losses of one training, and its seconds a step after the first tenth."""
    options = TrainOptions(
        model=str(model), data=[{"kind": "text", "path": str(args.text)}], seed=args.seed,
        schedule=[{"length": args.length, "steps": args.steps, "batch_rows": args.rows,
                   "lr": args.lr}],
        compute_dtype="bfloat16", linear_dtype=linear, save_every=args.steps, nproc=1)
    begin = time.monotonic()
    train(options, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = args.length * args.rows
    seconds = [tokens / line["tokens_per_second"] for line in lines[len(lines) // 10:]]
    return {"linear_dtype": linear, "losses": [line["loss"] for line in lines],
            "grad_norms": [line["grad_norm"] for line in lines],
            "seconds_a_step": statistics.median(seconds),
            "seconds": time.monotonic() - begin}


def compare(runs: list[dict[str, Any]]) -> None:
    """Add to every run how far its losses are from those of the first, over the last quarter."""
    def tail(each: dict[str, Any]) -> list[float]:
        return each["losses"][-max(1, len(each["losses"]) // 4):]

    reference = tail(runs[0])
    for each in runs:
        pairs = list(zip(tail(each), reference, strict=True))
        each["mean_loss"] = statistics.fmean(tail(each))
        each["mean_difference"] = statistics.fmean(a - b for a, b in pairs)
        each["largest_difference"] = max(abs(a - b) for a, b in pairs)


def draw(runs: list[dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, apart = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for number, each in enumerate(runs):
        steps = range(1, len(each["losses"]) + 1)
        name = {"compute": "bfloat16"}.get(each["linear_dtype"], each["linear_dtype"])
        style = {"label": name, "linewidth": 1, "color": f"C{number}"}
        losses.plot(steps, each["losses"], **style)
        if each is not runs[0]:
            apart.plot(steps, [a - b for a, b in zip(each["losses"], runs[0]["losses"],
                                                     strict=True)], **style)
    losses.set_title(title)
    losses.set_ylabel("loss (nats a token)")
    losses.legend()
    apart.axhline(0, color="black", linewidth=0.5)
    apart.set_ylabel("minus the first")
    apart.set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)


def write(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """What there is so far: a later run may be cut off."""
    compare(runs)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, emulated"
    name = args.model.name if args.model else f"Llama of {args.shape}, random weights"
    commit = args.commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                                           capture_output=True, text=True).stdout.strip()
    (args.out / "losses.json").write_text(json.dumps({
        "schema": 1, "command": " ".join(["fp8_loss.py", *sys.argv[1:]]), "commit": commit,
        "device": device, "torch": torch.__version__, "model": name, "length": args.length,
        "rows": args.rows, "lr": args.lr, "runs": runs}, indent=1))
    draw(runs, f"{name}, {args.rows} x {args.length} tokens a step, {device}",
         args.out / "losses.png")


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fp8-loss-") as directory:
        work = Path(directory)
        model = args.model or make_model(work / "model", args.shape, args.length, args.seed)
        runs = []
        for linear in args.linear.split(","):
            runs.append(run(args, model, linear, work / linear))
            print(f"{linear}: last loss {runs[-1]['losses'][-1]:.4f}, "
                  f"{runs[-1]['seconds_a_step']:.3f} s a step", flush=True)
            write(args, runs)
    print(args.out / "losses.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
