"""Where fuzzing starts: real files, and those that once brought a parser down."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "tests" / "fuzz_seeds"

_LIVE = {"recipe": "recipes/*.yaml", "config": "assets/demo/*/config.json",
         "card": "docs/results/**/README.md", "lines": "assets/demo/*.jsonl"}
_MOST_BYTES = 3000


def seeds_of(target: str) -> list[bytes]:
    """The seeds of a target, in a fixed order: kept ones, then files of this repository."""
    kept = sorted((SEEDS / target).glob("*")) if (SEEDS / target).is_dir() else []
    live = sorted(ROOT.glob(_LIVE[target])) if target in _LIVE else []
    cut = [_whole_lines(path.read_bytes()) for path in live]
    return [path.read_bytes() for path in kept] + cut + _headers(target)


def _whole_lines(data: bytes) -> bytes:
    """The first lines of a file: long inputs take long to read, and say little more."""
    return data if len(data) <= _MOST_BYTES else data[:data.rindex(b"\n", 0, _MOST_BYTES) + 1]


def _headers(target: str) -> list[bytes]:
    """A header of the demo's base as the target wants it: with the size of the body, cut short."""
    if target != "header":
        return []
    file = (ROOT / "assets" / "demo" / "base" / "model.safetensors").open("rb")
    with file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found, place = {}, 0
    for name, entry in list(entries.items())[:6]:
        if name != "__metadata__":
            found[name] = {**entry, "shape": [2, 3], "dtype": "BF16",
                           "data_offsets": [place, place + 12]}
            place += 12
    return [json.dumps(found).encode() + place.to_bytes(2, "little")]
