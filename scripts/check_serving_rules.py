"""Run the LoRA loaders of vLLM and SGLang on good and damaged adapters; compare with our rules.

    pip download --no-deps vllm==0.33.0 vllm==0.11.0 sglang==0.5.23     # one by one
    unzip -d vllm-new vllm-0.33.0*.whl 'vllm/lora/*' ; ..
    python -m scripts.check_serving_rules --vllm vllm-new --vllm-old vllm-old --sglang sglang

The files that read an adapter are the engine's own; what they import beside torch is mocked, so no
GPU and no installation is needed. One engine is run in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from extend.adapter_format.serving import ENGINES, check_serving
from tests.adapter_format.serving_cases import CASES, CONFIG, VOCAB, Case, write_case

_NOT_PLAIN = ("layer_replication", "alora_invocation_tokens")
_ROUNDING = 1e-5  # sums of up to 600 fp32 products in another order


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ENGINES:
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="UNPACKED_WHEEL")
    parser.add_argument("--only", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    if arguments["only"]:
        name = arguments["only"]
        print(json.dumps(run_engine(name, arguments[name.replace("-", "_")])))
        return 0
    seen = {name: json.loads(subprocess.run(
        [sys.executable, "-m", "scripts.check_serving_rules", *sys.argv[1:], "--only", name],
        stdout=subprocess.PIPE, check=True, text=True).stdout) for name in ENGINES}
    return report(seen)


def run_engine(name: str, root: Path) -> dict[str, str]:
    """case -> what the engine's loader did."""
    torch.set_num_threads(1)
    if name == "sglang":
        from transformers import LlamaConfig

        from scripts.serving_loaders.sglang import Loader as SglangLoader

        loader = SglangLoader(root, LlamaConfig(**{k: v for k, v in CONFIG.items()
                                                   if k != "rope_theta"}))
    else:
        from scripts.serving_loaders.vllm import Loader as VllmLoader

        loader = VllmLoader(root)
    with tempfile.TemporaryDirectory() as folder:
        return {case: verdict(loader, Path(folder) / str(i), options)
                for i, (case, options) in enumerate(CASES.items())}


def verdict(loader, directory: Path, case: Case) -> str:
    right = write_case(directory, case)
    try:
        found = loader.load(directory, VOCAB)
    except Exception as error:  # whatever a loader raises is a refusal
        print(f"{directory.name}: {type(error).__name__}: {str(error)[:120]}", file=sys.stderr)
        return "refuses"
    whole = [name for name in case.extra if "base_layer" not in name
             and ("lora_" not in name or name.endswith(".bias"))]
    changed = (isinstance(case.config.get("init_lora_weights"), str)
               and case.config["init_lora_weights"] != "gaussian")
    if whole or changed or any(case.config.get(key) for key in _NOT_PLAIN):
        return "wrong"  # loaded, but these tensors or these keys were not read
    same = all(name in found and found[name].shape == delta.shape
               and float((found[name] - delta).abs().max()) <= _ROUNDING * float(delta.abs().max())
               for name, delta in right.items())
    more = any(name not in right and bool(delta.any()) for name, delta in found.items())
    return "ok" if same and not more else "wrong"


def report(seen: dict[str, dict[str, str]]) -> int:
    """Print the table of verdicts; return how many of the rules' own differ."""
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, case) in enumerate(CASES.items()):
            write_case(Path(folder) / str(i), case)
            ours = {v.engine: v.verdict for v in check_serving(Path(folder) / str(i))}
            theirs = {engine: seen[engine][name] for engine in ENGINES}
            mark = "" if ours == theirs else f"   rules say {tuple(ours.values())}"
            different += bool(mark)
            print(f"    {json.dumps(name)}: ({', '.join(map(json.dumps, theirs.values()))}),{mark}")
    print(f"{len(CASES)} adapters, {different} with another verdict by our rules")
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
