"""Which files of a repository are needed: safetensors weights and what lies beside them.

Weights in pickle's format are never fetched: to read them can run any code.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from extend.checkpoint import INDEX_NAME, SINGLE_NAME
from extend.errors import CheckpointError
from extend.model_config import read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_BESIDE = ("*.json", "*.jinja", "additional_chat_templates/*", "tokenizer*", "vocab.*",
           "merges.txt", "*.model", "*.tiktoken", "*.py", "README.md", "LICENSE*", "NOTICE*",
           "extend_*.safetensors")
_NOT_BESIDE = ("*.bin.index.json", "*.msgpack.index.json", "*.h5.index.json", INDEX_NAME)
_DOCUMENTS = ("README.md", "LICENSE*", "NOTICE*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def choose_files(names: Iterable[str], read_index: Callable[[], Mapping[str, Any]], *,
                 weights: bool = True) -> list[str]:
    """The files of a model or an adapter, from the listing of its repository.

    Args:
        names: of all files.
        read_index: gives the content of `model.safetensors.index.json`.
        weights: False leaves those of a model out.

    Raises:
        CheckpointError: no safetensors weights, a shard that is not there, or no config.
    """
    names = sorted(names)
    known = set(names)
    beside = [name for name in names if _fits(name, _BESIDE) and not _fits(name, _NOT_BESIDE)]
    if not weights:
        return sorted({*beside, ADAPTER_WEIGHTS} & known)
    found = [ADAPTER_WEIGHTS] if ADAPTER_WEIGHTS in known else []
    if INDEX_NAME in known:
        found += [INDEX_NAME, *_shards(read_index(), known)]
    elif SINGLE_NAME in known:
        found.append(SINGLE_NAME)
    if not found:
        raise CheckpointError(_no_weights(names))
    config = _ADAPTER_CONFIG if found == [ADAPTER_WEIGHTS] else "config.json"
    if config not in known:
        raise CheckpointError(f"it has weights but no {config}")
    return sorted({*beside, *found})


def files_in_cache(folder: Path) -> list[str]:
    """The files of a commit in the Hub's cache that count as its content.

    Documents, which are not always fetched, do not. Of a folder that is no whole model, all do.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                   if path.is_file())
    with contextlib.suppress(CheckpointError):
        names = choose_files(names, lambda: read_json(folder / INDEX_NAME))
    return [name for name in names if not _fits(name, _DOCUMENTS)]


def _shards(index: Mapping[str, Any], known: set[str]) -> list[str]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"its {INDEX_NAME} holds no weight_map")
    shards = sorted(set(map(str, places.values())))
    missing = [shard for shard in shards if shard not in known]
    if missing:
        raise CheckpointError(f"its {INDEX_NAME} names {len(shards)} files, of which "
                              f"{', '.join(missing[:3])}{' and more' if missing[3:] else ''} "
                              "is not there")
    return shards


def _no_weights(names: Sequence[str]) -> str:
    pickles = [name for name in names if _fits(name, _PICKLES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if pickles:
        return (f"it has weights only as {', '.join(pickles[:3])}, which can run any code when "
                "they are read; only safetensors are, so choose a revision that has them, or "
                "convert it in a place that you can afford to lose")
    if ggufs:
        return (f"it has weights only as GGUF; run `extend import ORG/NAME:{ggufs[0]} --out DIR` "
                "and give that directory")
    others = [name for name in names if name.endswith(".safetensors")]
    return (f"it has no {SINGLE_NAME}, {INDEX_NAME} or {ADAPTER_WEIGHTS}"
            + (f", but {', '.join(others[:3])}, which is not in the format of transformers"
               if others else ""))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/")
               for pattern in patterns)
