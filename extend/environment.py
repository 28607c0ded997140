"""What a bug report needs to say about a machine, without anything secret.

Values of variables are told only where their names are those of the tools below; tokens and
passwords are told as `set`, and the home directory as `~`.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extend.manifest import machine, versions
from extend.secrets import HIDDEN, NAMES, hide_secrets

_MORE_PACKAGES = ("numpy", "pydantic", "huggingface_hub", "tokenizers", "triton", "torchao",
                  "flash-attn", "flash-attn-4", "gguf", "lm-eval", "click", "rich")
_VARIABLES = re.compile(r"(EXTEND|HF|HUGGINGFACE|TRANSFORMERS|CUDA|NVIDIA|NCCL|GLOO|TORCH|PYTORCH|"
                        r"OMP|MKL|SLURM_(JOB_ID|NNODES|NTASKS|GPUS\w*)|XDG_CACHE|TOKENIZERS)(_|$)|"
                        r"(RANK|WORLD_SIZE|LOCAL_RANK|NO_COLOR|TERM)$")
_IN_VALUE = re.compile(r"(?<=//)[^/@\s]+(?=@)|\bhf_\w{6,}")
_SECONDS = 20  # nvidia-smi of a broken driver may never answer


def describe_environment() -> dict[str, Any]:
    """Versions, machine, GPUs and their links, variables and paths; values are JSON."""
    return {
        "extend": {"version": versions()["extend"], "commit": _commit(),
                   "path": hide(str(Path(__file__).parent))},
        "packages": _packages(), "machine": _machine(), "torch": _torch(), "gpus": _gpus(),
        "links": _links(), "variables": _variables(os.environ), "paths": _paths()}


def hide(text: str) -> str:
    """The text without what stands for a user: passwords in addresses, tokens, the home."""
    home = str(Path.home())
    text = _IN_VALUE.sub(HIDDEN, hide_secrets(text))
    return re.sub(re.escape(home) + r"(?=/|$|:)", "~", text) if len(home) > 1 else text


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: "set" if NAMES.search(name) else hide(value)
            for name, value in sorted(environ.items()) if _VARIABLES.match(name)}


def _packages() -> dict[str, str]:
    found = {name: version for name, version in versions().items() if name != "extend"}
    for name in _MORE_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of the source tree that this runs from; None in an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    return _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"])


def _machine() -> dict[str, Any]:
    """As manifests tell it, less the GPUs; cores are those that this process may use."""
    found = {key: value for key, value in machine().items() if key != "gpus"}
    if hasattr(os, "sched_getaffinity"):
        found["cores"] = len(os.sched_getaffinity(0))
    return found


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation is just what a report is about
        return {"error": hide(f"{type(error).__name__}: {error}")}
    found: dict[str, Any] = {"cuda": torch.version.cuda, "threads": torch.get_num_threads(),
                             "devices": torch.cuda.device_count()}
    if found["devices"]:
        found |= {"cudnn": torch.backends.cudnn.version(),
                  "nccl": ".".join(map(str, torch.cuda.nccl.version())),
                  "capability": "{}.{}".format(*torch.cuda.get_device_capability(0))}
    return found


def _gpus() -> list[dict[str, str]]:
    keys = ("name", "memory.total", "driver_version")
    told = _output(["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"])
    return [dict(zip(("name", "memory", "driver"), map(str.strip, line.split(","))))
            for line in (told or "").splitlines()]


def _links() -> dict[str, dict[str, str]]:
    """GPU -> other GPU -> what joins them, as nvidia-smi names it: NV18, PIX, SYS and so on."""
    told = re.sub(r"\x1b\[[0-9;]*m", "", _output(["nvidia-smi", "topo", "-m"]) or "")
    rows = [line.split() for line in told.splitlines() if line.strip().startswith("GPU")]
    if not rows:
        return {}
    columns = [name for name in rows[0] if re.fullmatch(r"GPU\d+", name)]
    return {row[0]: {other: link for other, link in zip(columns, row[1:]) if other != row[0]}
            for row in rows if len(row) > len(columns) and row[0] in columns and row[1] != "GPU1"}


def _paths() -> dict[str, str]:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    places = {"python": sys.executable, "directory": os.getcwd(), "hub": hub,
              "cache": os.environ.get("EXTEND_CACHE") or f"{cache}/extend"}
    found = {name: hide(str(Path(path).expanduser())) for name, path in places.items()}
    return {**found, "free_bytes": shutil.disk_usage(Path.cwd()).free}


def _output(command: list[str]) -> str | None:
    """What a program prints; None if there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS,
                              stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
