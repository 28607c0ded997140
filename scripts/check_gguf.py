"""Convert merged checkpoints with llama.cpp's converter, and read and import the GGUF files.

    pip download --no-deps --no-binary :all: --no-build-isolation llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz     # vendor/llama.cpp is a checkout
    python scripts/check_gguf.py llama_cpp_python-0.3.36/vendor/llama.cpp \
        --tokenizer data/smollm2-135m-instruct --out docs/results/serving

For each RoPE: a tiny Llama with a real tokenizer is rescaled, moved, extracted and merged into a
sibling; the merged model is converted, and so is the adapter. Every tensor of the GGUF must be the
merged one, bit for bit, and the frequencies that its keys give must be those that `extend doctor`
says llama.cpp computes. `extend import` of the file must give the merged weights, config keys and
tokenizer again. Needs `pip install gguf` beside the project, and no compiler. With --model
the first method is also run on a real checkpoint (its long model is the checkpoint, moved).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch

from extend.adapter import extract
from extend.checkpoint import Checkpoint, write_checkpoint
from extend.doctor.readers import read_with
from extend.doctor.reading import ModelFiles
from extend.gguf import import_gguf
from extend.merge import merge
from extend.model_config import read_config
from extend.rope import rescale
from extend.tokenizer import load_tokenizer

NATIVE, LONG = 2048, 16384
METHODS: dict[str, dict[str, Any]] = {
    "ntk": {}, "critical": {}, "theta": {"rope_theta": 5e5}, "linear": {}, "llama3": {},
    "ntk-by-parts": {}, "yarn": {}}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_ADAPTER_RANK = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("llama_cpp", type=Path, help="a checkout, with convert_hf_to_gguf.py")
    parser.add_argument("--tokenizer", type=Path, required=True,
                        help="directory of a tokenizer that the converter knows")
    parser.add_argument("--model", type=Path, help="a real Llama checkpoint to run as well")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, help="directory for gguf.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_model(Path(folder) / "base", args.tokenizer)
        runs = [(name, base) for name in args.methods]
        runs += [(args.methods[0], args.model)] if args.model else []
        for i, (name, model) in enumerate(runs):
            rows.append(check(name, model, args.llama_cpp, Path(folder) / str(i)))
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gguf.json").write_text(json.dumps(
            {"schema": 1, "versions": versions(), "rows": rows}, indent=2) + "\n")
    return int(not all(row["ok"] for row in rows))


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    names = ("torch", "transformers", "gguf")
    return {**{name: version(name) for name in names}, "commit": commit.stdout.strip()}


def tiny_model(directory: Path, tokenizer: Path) -> Path:
    """A random Llama of two layers with as many tokens as the tokenizer's own config says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=NATIVE,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=True,
    )).to(torch.bfloat16).save_pretrained(directory)
    for name in _TOKENIZER_FILES:
        copyfile(tokenizer / name, directory / name)
    return directory


def move(source: Path, out: Path, seed: int) -> Path:
    """A copy of a checkpoint whose weights are a little off, each by noise of its own size."""
    files, generator = Checkpoint(source), torch.Generator().manual_seed(seed)
    out.mkdir()

    def moved(name: str) -> Iterator[torch.Tensor]:
        weight = files.read(name)
        noise = torch.randn(weight.shape, generator=generator)
        yield (weight.float() * (1 + 0.02 * noise)).to(weight.dtype)

    write_checkpoint(out, [files.infos[name] for name in files.names], moved)
    for name in ("config.json", *_TOKENIZER_FILES):
        copyfile(source / name, out / name)
    return out


def check(method: str, base: Path, llama_cpp: Path, folder: Path) -> dict[str, Any]:
    """Run the whole way for one method; what was found, and whether all of it is right."""
    folder.mkdir()
    native = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    length = LONG if native == NATIVE else 4 * native
    init = rescale(base, folder / "init", target_len=length, method=method, **METHODS[method])
    adapter = extract(base, move(init, folder / "long", 1), folder / "adapter", rank=_ADAPTER_RANK)
    merged = merge(adapter, move(base, folder / "sibling", 2), folder / "merged")
    start = time.monotonic()
    convert(llama_cpp / "convert_hf_to_gguf.py", merged, folder / "merged.gguf")
    seconds = round(time.monotonic() - start, 1)
    convert(llama_cpp / "convert_lora_to_gguf.py", adapter, folder / "adapter.gguf", base)
    config = json.loads((merged / "config.json").read_text())
    fields, tensors = read_gguf(folder / "merged.gguf")
    expected = expected_tensors(merged, config)
    extra = {name: value for name, value in tensors.items() if name not in expected}
    different = [n for n, w in expected.items() if not same(tensors.get(n), w)]
    gap = frequency_gap(fields, extra, config)
    row = {"model": "tiny" if native == NATIVE else base.name, "method": method,
           "rope_type": config["rope_parameters"]["rope_type"],
           "context_length": fields["llama.context_length"],
           "freq_base": fields["llama.rope.freq_base"],
           "scaling": {k.removeprefix("llama.rope."): v for k, v in fields.items()
                       if ".rope.scaling." in k},
           "tensors": len(expected), "different": different, "extra": sorted(extra),
           "largest_frequency_gap": gap,
           "lora_tensors": lora_tensors(folder / "adapter.gguf", adapter, config),
           "convert_seconds": seconds, "import": import_back(folder / "merged.gguf", merged)}
    row["ok"] = (row["import"] == "same" and not different
                 and set(extra) <= {"rope_freqs.weight"} and gap < 1e-6
                 and row["context_length"] == length and isinstance(row["lora_tensors"], int))
    return row


def import_back(file: Path, merged: Path) -> str:
    """`same`, or what an import of the file does not give back."""
    out = import_gguf(file, file.with_name("imported"))
    files, wanted = Checkpoint(out), Checkpoint(merged)
    if files.infos != wanted.infos:
        return "names, shapes or dtypes differ"
    other = [n for n in files.names if not torch.equal(files.read(n), wanted.read(n))]
    if other:
        return f"{len(other)} tensors differ, the first {other[0]}"
    found, config = read_config(out), read_config(merged)
    for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
                "intermediate_size", "max_position_embeddings", "tie_word_embeddings"):
        if getattr(found, key) != getattr(config, key):
            return f"{key} is {getattr(found, key)}, not {getattr(config, key)}"
    if not alike(found.rope.to_json(), config.rope.to_json()):
        return f"the RoPE is {found.rope.to_json()}, not {config.rope.to_json()}"
    return same_tokens(out, merged)


def alike(found: Any, wanted: Any) -> bool:
    """Equal, but for the rounding of numbers to fp32 in the file."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(alike(found[k], wanted[k]) for k in wanted)
    return math.isclose(found, wanted, rel_tol=2e-7) if isinstance(wanted, float) \
        else found == wanted


def same_tokens(out: Path, merged: Path) -> str:
    """`same` when both tokenizers give the same ids for the project's own sources."""
    ours, theirs = load_tokenizer(out), load_tokenizer(merged)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        text = source.read_text()
        if ours.encode(text) != theirs.encode(text):
            return f"the tokens of {source.name} differ"
    return "same"


def convert(script: Path, source: Path, out: Path, base: Path | None = None) -> None:
    options = [] if base is None else ["--base", str(base)]
    done = subprocess.run([sys.executable, str(script), str(source), "--outfile", str(out),
                           "--outtype", "f32", *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script.name} fails on {source}:\n{done.stderr[-3000:]}")


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All keys, and all tensors in the order of torch's dimensions."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    return ({name: field.contents() for name, field in reader.fields.items()},
            {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors})


def same(found: np.ndarray | None, wanted: np.ndarray) -> bool:
    """Equal in shape and in every number."""
    return found is not None and found.shape == wanted.shape and bool((found == wanted).all())


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring channels, transformers those half a head apart."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def expected_tensors(directory: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The checkpoint's weights in fp32 under llama.cpp's names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    files, found = Checkpoint(directory), {}
    for name in files.names:
        weight = files.read(name).float().numpy()
        kind = name.split(".")[-2]
        found[names.get_name(name, try_suffixes=(".weight",))] = (
            permute(weight, heads[kind]) if kind in heads else weight)
    return found


def frequency_gap(fields: Mapping[str, Any], extra: Mapping[str, np.ndarray],
                  config: Mapping[str, Any]) -> float:
    """The largest relative gap between what the file gives and what the doctor says it does."""
    reading = read_with("llama.cpp", ModelFiles(config, {}, {}))
    wanted = np.array(reading.main.long)
    return float(np.abs(gguf_frequencies(fields, extra) / wanted - 1).max())


def gguf_frequencies(fields: Mapping[str, Any], extra: Mapping[str, np.ndarray]) -> np.ndarray:
    """Radians per token of each pair, as ggml's `rope_yarn` computes them from a file's keys."""
    dim, theta = fields["llama.rope.dimension_count"], fields["llama.rope.freq_base"]
    pairs = np.arange(0, dim, 2)
    plain = theta ** (-pairs / dim) / extra.get("rope_freqs.weight", np.ones(dim // 2))
    kind = fields.get("llama.rope.scaling.type", "none")
    factor = fields.get("llama.rope.scaling.factor", 1.0)
    if kind == "linear":
        return plain / factor
    if kind != "yarn":
        return plain
    original = fields["llama.rope.scaling.original_context_length"]
    low, high = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                 for turns in (fields.get("llama.rope.scaling.yarn_beta_fast", 32.0),
                               fields.get("llama.rope.scaling.yarn_beta_slow", 1.0)))
    low, high = max(0, math.floor(low)), min(dim - 1, math.ceil(high))
    ramp = 1 - np.clip((pairs / 2 - low) / max(0.001, high - low), 0, 1)
    return plain / factor * (1 - ramp) + plain * ramp


def lora_tensors(path: Path, adapter: Path, config: Mapping[str, Any]) -> int | str:
    """How many factors of the converted adapter are right, or what is wrong with it."""
    from safetensors.torch import load_file

    _, found = read_gguf(path)
    factors = load_file(adapter / "adapter_model.safetensors")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for key, factor in factors.items():
        module, letter = key.removeprefix("base_model.model.").split(".lora_")
        name = names.get_name(module, try_suffixes=(".weight",))
        weight = factor.float().numpy()
        kind = name.split(".")[-1]
        if letter.startswith("B") and kind in heads:
            weight = permute(weight, heads[kind])
        stored = found.pop(f"{name}.weight.lora_{letter[0].lower()}", None)
        if not same(stored, weight):
            return f"{key} is {'absent' if stored is None else 'another'}"
    return len(factors) if not found else f"{sorted(found)} are new"


if __name__ == "__main__":
    sys.exit(main())
