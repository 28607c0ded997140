#!/usr/bin/env python3
"""The same training by `extend train` and by transformers' Trainer (with PEFT), step by step.

    python scripts/train_parity.py --out docs/results/train/parity-cpu.md
    python scripts/train_parity.py --model DIR --length 4096 --rows 2 --out parity-gpu.md

Both get the same rows, AdamW, clipping and learning rates (the Trainer's own cosine, one step on,
since ours counts the tokens at a step's end). Then `extend train` against itself: on several
processes, by every layout and strategy, and under every option of memory. Without --model it makes
a small Llama with random weights and text of made-up words. Uses one GPU where there is one;
several processes are tried where there are as many GPUs, or none.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import Dataset, SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from extend.model_config import read_config  # noqa: E402
from extend.retrieval.names import NAMES  # noqa: E402
from extend.train.data import IGNORE, Row, load_rows  # noqa: E402
from extend.train.loop import run_process  # noqa: E402
from extend.train.memory import store  # noqa: E402
from extend.train.model import load_model  # noqa: E402
from extend.train_options import TrainOptions  # noqa: E402

LORA, BF16 = {"mode": "lora", "lora_rank": 8}, {"compute_dtype": "bfloat16"}
CASES = {
    "fp32": {"document_mask": False},
    "fp32, masks of documents": {},
    "fp32, LoRA of rank 8": LORA,
    "bf16": BF16,
    "bf16, LoRA of rank 8": LORA | BF16,
    "bf16 weights": {"weight_dtype": "bfloat16"} | BF16,
}
RING_ROWS = 3  # of a step: 2 and 4 processes cannot have whole ones, and share each in a ring
# name -> processes, rows of a step, options; each against the same rows on one process with the
# defaults. No rows: those of the comparison with the Trainer, whole ones on each process.
VARIANTS = {
    "no layer computed again": (1, RING_ROWS, {"recomputed_layers": 0}),
    "one layer computed again": (1, RING_ROWS, {"recomputed_layers": 1}),
    "attention computed again": (1, RING_ROWS, {"kept_attention": 0}),
    "attention of one layer kept": (1, RING_ROWS, {"kept_attention": 1}),
    "kept on the host": (1, RING_ROWS, {"host_memory": "8GiB"}),
    "kept on the host, 1 MiB": (1, RING_ROWS, {"host_memory": "1MiB"}),
    "tiles of 70 tokens": (1, RING_ROWS, {"tile_tokens": 70}),
    "logits of 100 tokens at once": (1, RING_ROWS, {"loss_chunk": 100}),
    "kept in fp8": (1, RING_ROWS, {"kept_form": "fp8"}),
    "2 processes, whole rows": (2, None, {}),
    "4 processes, whole rows": (4, None, {}),
    **{f"ring of 2, {layout}, {strategy}": (2, RING_ROWS, {"layout": layout, "strategy": strategy})
       for layout, strategy in (("zigzag", "ring"), ("contiguous", "ring"), ("striped", "ring"),
                                ("zigzag", "all-gather"), ("zigzag", "ulysses"))},
    "ring of 2, host and tiles": (2, RING_ROWS, {"host_memory": "8GiB", "tile_tokens": 70}),
    **{f"ring of 4, {strategy}": (4, RING_ROWS, {"strategy": strategy})
       for strategy in ("ring", "usp:2", "double-ring:2")},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a checkpoint; default: a small Llama is made")
    add("--text", help="JSON lines with 'text'; default: made-up words")
    add("--length", type=int, default=240, help="tokens of a row")
    add("--rows", type=int, default=4, help="rows of a step; the Trainer adds up two batches")
    add("--steps", type=int, default=20)
    add("--lr", type=float, default=3e-3)
    add("--ranks", type=int, default=4, help="most processes of one run")
    add("--threads", type=int, default=1)
    add("--out", type=Path, required=True, help="a Markdown file; the numbers go beside it as JSON")
    args = parser.parse_args()
    if args.steps % 5 or args.rows % 2:
        parser.error("the Trainer warms up for whole steps and adds up two batches: give --steps a "
                     "multiple of 5 and --rows an even number")
    return args


def prepare() -> None:
    """No noise; and what layers keep is moved about however small it is."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("torch.utils._pytree", "torchao"):  # told on import, in every process
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    store._SMALLEST_BYTES = 1


def make_model(directory: Path, layers: int = 3) -> Path:
    """A Llama with grouped keys, tied embeddings, one token a byte."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=160, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True, initializer_range=0.1)).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"<|end|>": 0} | {char: i for i, char in
                                                           enumerate(alphabet, 1)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.save_pretrained(directory)
    return directory


def make_text(file: Path) -> Path:
    """Documents of 2 to 100 words, the common ones much more often than the rare ones."""
    rng = random.Random(0)
    weights = [1 / (i + 1) for i in range(len(NAMES))]
    lines = [json.dumps({"text": " ".join(rng.choices(NAMES, weights, k=rng.randint(2, 100)))})
             for _ in range(400)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def make_options(args: argparse.Namespace, changes: dict[str, Any]) -> TrainOptions:
    phase = {"length": args.length, "steps": args.steps, "batch_rows": args.rows, "lr": args.lr,
             "warmup_frac": 0.2}
    return TrainOptions(**{
        "model": args.model, "data": [{"kind": "text", "path": args.text}], "schedule": [phase],
        "weight_decay": 0.1, "clip_norm": 1.0, "seed": 1} | {"compute_dtype": "float32"} | changes)


# --- extend train ---------------------------------------------------------------------------------

def train_ours(args: argparse.Namespace, runs: dict[str, dict[str, Any]], world: int,
               directory: Path) -> dict[str, Any]:
    """name -> steps and weights of every run, all of them in one group of processes."""
    directory.mkdir(exist_ok=True)
    outs = {name: directory / f"ours-{world}-{i}" for i, name in enumerate(runs)}
    jobs = [(make_options(args, changes).model_dump(), str(outs[name]))
            for name, changes in runs.items()]
    if world == 1:
        for options, out in jobs:
            run_process(TrainOptions(**options), Path(out), False)
    else:
        mp.spawn(_work, (world, str(directory / f"store-{world}"), jobs), nprocs=world)
    return {name: (read_steps(out), load_file(out / "model.safetensors"))
            for name, out in outs.items()}


def _work(rank: int, world: int, store: str, jobs: list[tuple[dict[str, Any], str]]) -> None:
    torch.set_num_threads(1)
    prepare()
    os.environ |= {"LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=world)
    for options, out in jobs:
        run_process(TrainOptions(**options), Path(out), False)
    dist.barrier()
    dist.destroy_process_group()


def read_steps(out: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines] for key in ("loss", "grad_norm", "lr")}


# --- transformers' Trainer ------------------------------------------------------------------------

class RowSet(Dataset):
    """Rows as the Trainer takes them; positions begin anew with each document under its mask."""

    def __init__(self, rows: list[Row], document_mask: bool):
        self.rows, self.document_mask = rows, document_mask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        labels = row.labels.copy()
        labels[0] = IGNORE  # nothing predicts it, and some versions of the Trainer count it
        item = {"input_ids": row.input_ids, "labels": labels}
        if self.document_mask:
            sizes = np.diff(row.cu_seqlens)
            item["position_ids"] = np.concatenate([np.arange(size) for size in sizes])
        return {key: torch.from_numpy(value) for key, value in item.items()}


class InOrder(Trainer):
    """The Trainer, reading rows in their order, with its learning rates one step on."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().create_scheduler(*args, **kwargs)
        self.optimizer._opt_called = True  # or torch warns that a step of the schedule is lost
        scheduler.step()
        return scheduler


class Rates(TrainerCallback):
    """The learning rates that steps were taken with; what is logged is the next one's."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])


def train_theirs(args: argparse.Namespace, changes: dict[str, Any],
                 directory: Path) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    options = make_options(args, changes)
    phase = options.schedule[0]
    rows = load_rows(options, AutoTokenizer.from_pretrained(options.model))
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.weight_dtype), attn_implementation="sdpa")
    if options.mode == "lora":
        model = add_lora(model, options)
    trainer = InOrder(model, TrainingArguments(
        output_dir=str(directory / "trainer"), max_steps=phase.num_steps, report_to=[],
        per_device_train_batch_size=max(1, phase.batch_rows // 2),
        gradient_accumulation_steps=min(2, phase.batch_rows), learning_rate=phase.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": phase.min_lr_frac},
        warmup_steps=round(phase.warmup_frac * phase.num_steps), optim="adamw_torch",
        adam_beta1=options.betas[0], adam_beta2=options.betas[1], adam_epsilon=1e-8,
        weight_decay=options.weight_decay, max_grad_norm=options.clip_norm,
        bf16=options.compute_dtype == "bfloat16" != options.weight_dtype,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
    ), train_dataset=RowSet([rows.row(0, i) for i in range(phase.num_steps * phase.batch_rows)],
                            options.document_mask))
    trainer.remove_callback(PrinterCallback)
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    steps = {key: [float(line[key]) for line in logs] for key in ("loss", "grad_norm")}
    steps["lr"] = rates.seen
    plain = model.merge_and_unload() if options.mode == "lora" else model
    return steps, {name: value.detach().cpu() for name, value in plain.state_dict().items()}


def add_lora(model: Any, options: TrainOptions) -> Any:
    """PEFT's model with the adapters that ours begins with."""
    ours = load_model(options, read_config(options.model))
    start = {name: p for name, p in ours.named_parameters() if ".lora_" in name}
    head = model.get_output_embeddings()
    targets = [name for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and module is not head]
    peft = get_peft_model(model, LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank,
                                            lora_dropout=0.0, target_modules=targets))
    theirs = {name.removeprefix("base_model.model."): p for name, p in peft.named_parameters()
              if ".lora_" in name}
    assert start.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(start[name])
    return peft


# --- comparison -----------------------------------------------------------------------------------

def compare(one: tuple[dict[str, list[float]], dict[str, Tensor]],
            other: tuple[dict[str, list[float]], dict[str, Tensor]]) -> dict[str, float | bool]:
    """Largest differences: of losses, of norms (relative), and of weights (by their largest)."""
    (steps, weights), (other_steps, other_weights) = one, other
    loss, norm, lr = (np.abs(np.subtract(steps[k], other_steps[k])) for k in steps)
    return {"first_loss": float(loss[0]), "loss": float(loss.max()),
            "grad_norm": float((norm / np.asarray(steps["grad_norm"])).max()),
            "lr": float(lr.max() / max(steps["lr"])),
            "weights": max(float((value.float() - other_weights[name].float()).abs().max()
                                 / value.float().abs().max()) for name, value in weights.items()),
            "same_bits": steps == other_steps and all(
                torch.equal(value, other_weights[name]) for name, value in weights.items())}


def main() -> int:
    args = parse()
    args.commit = read_commit()
    torch.set_num_threads(args.threads)
    prepare()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        args.model = args.model or str(make_model(directory / "model"))
        args.text = args.text or str(make_text(directory / "text.jsonl"))
        ours = train_ours(args, CASES, 1, directory)
        theirs = {case: train_theirs(args, changes, directory) for case, changes in CASES.items()}
        result = {"cases": {case: compare(ours[case], theirs[case]) for case in CASES},
                  "to_fp32": {side: compare(ours["fp32, masks of documents"], runs["bf16"])
                              for side, runs in (("ours", ours), ("theirs", theirs))},
                  "steps": {case: {"ours": ours[case][0], "theirs": theirs[case][0]}
                            for case in CASES},
                  "variants": run_variants(args, ours, directory)}
    write(args, result)
    return 0


def run_variants(args: argparse.Namespace, ours: dict[str, Any],
                 directory: Path) -> dict[str, dict[str, Any]]:
    """Every variant in fp32 and under bf16, against the plain run of the same rows."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else args.ranks
    most = min(args.ranks, gpus)
    cases = {"fp32": "fp32, masks of documents", "bf16": "bf16"}
    sizes = {None: args, RING_ROWS: argparse.Namespace(**vars(args) | {"rows": RING_ROWS})}
    found: dict[str, dict[str, Any]] = {}
    for rows, size in sizes.items():
        folder = directory / f"variants-{rows}"
        folder.mkdir()
        plain = {kind: ours[case] for kind, case in cases.items()} if rows is None else train_ours(
            size, {kind: CASES[case] for kind, case in cases.items()}, 1, folder / "plain")
        for world in sorted({world for world, _, _ in VARIANTS.values() if world <= most}):
            runs = {f"{kind} {name}": CASES[case] | changes for kind, case in cases.items()
                    for name, (ranks, own, changes) in VARIANTS.items()
                    if (ranks, own) == (world, rows)}
            for name, run in (train_ours(size, runs, world, folder) if runs else {}).items():
                kind, _, variant = name.partition(" ")
                found.setdefault(variant, {})[kind] = compare(plain[kind], run)
    return {name: found[name] for name in VARIANTS if name in found}


def read_commit() -> str:
    """Of the code that runs; a plus sign where files are changed."""
    git = ["git", "describe", "--always", "--exclude", "*", "--dirty=+"]
    return subprocess.run(git, cwd=ROOT, text=True, capture_output=True).stdout.strip()


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    commit = args.commit
    command = " ".join(["scripts/train_parity.py", *sys.argv[1:]])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({
        "schema": 1, "command": command, "commit": commit, "device": device,
        "torch": torch.__version__, "transformers": transformers.__version__} | result, indent=1))
    text = render(args, result, f"`{command}`, {device}, torch {torch.__version__}, transformers "
                                f"{transformers.__version__}, commit {commit}")
    args.out.write_text(text, encoding="utf-8")
    print(text)


def render(args: argparse.Namespace, result: dict[str, Any], how: str) -> str:
    cases = [f"| {name} | {row['first_loss']:.1e} | {row['loss']:.1e} | {row['grad_norm']:.1e} | "
             f"{row['lr']:.0e} | {row['weights']:.1e} |" for name, row in result["cases"].items()]
    variants = [f"| {name} | " + " | ".join(
        "the same bits" if row["same_bits"] else f"{row['loss']:.1e}, {row['weights']:.1e}"
        for row in kinds.values()) + " |" for name, kinds in result["variants"].items()]
    fp32, bf16 = (result["steps"][case] for case in ("fp32, masks of documents", "bf16"))
    columns = [steps[side]["loss"] for steps in (fp32, bf16) for side in ("ours", "theirs")]
    losses = [f"| {i} | " + " | ".join(f"{value:.6f}" for value in row) + " |"
              for i, row in enumerate(zip(*columns, strict=True), 1)]
    away = result["to_fp32"]
    return "\n".join([
        "# Training against transformers' Trainer, and against itself", "", f"{how}.", "",
        f"{args.steps} steps of {args.rows} rows of {args.length} tokens. Largest difference over "
        "the steps: of the loss; of the gradient's norm, relative; of the learning rate, relative; "
        "of the final weights, relative to the largest of each tensor.", "",
        "| | loss, first step | loss | gradient norm | learning rate | weights |",
        "| --- | --- | --- | --- | --- | --- |", *cases, "",
        "In fp32 what is left is the order of sums. bf16 rounds each value by up to 2^-9 (0.002) "
        "of it; which way depends on how a product is cut (documents in one call or under a mask, "
        "the logits in chunks, tiles, parts of a row on other processes), so no two ways agree to "
        "the bit. Ours computes all of a layer in bf16; the Trainer computes under autocast, which "
        "leaves norms and what is added up between layers in fp32. Both update fp32 weights. Away "
        f"from fp32, the loss is {away['ours']['loss']:.1e} with ours and "
        f"{away['theirs']['loss']:.1e} with the Trainer. "
        "Weights differ more where Adam divides a gradient that is all rounding by its own size.",
        "",
        "## Against one process with the defaults", "",
        f"Largest difference of losses and of the final weights; {RING_ROWS} rows a step, which "
        "a ring of processes shares; whole rows are those of the table above.", "",
        "| | fp32 | bf16 |", "| --- | --- | --- |", *variants, "",
        "## Losses", "",
        "| step | fp32, ours | Trainer | bf16, ours | Trainer |",
        "| --- | --- | --- | --- | --- |", *losses, ""])


if __name__ == "__main__":
    sys.exit(main())
