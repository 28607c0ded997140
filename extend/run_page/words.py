"""Numbers and names as the page writes them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HASH_DIGITS = 12


def duration(seconds: float | None) -> str:
    """`0.65 s`, `35 s`, `12 min 5 s`, `3 h 20 min`; a dash for what is not known."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole // 60 % 60} min"


def gib(size: float | None) -> str:
    """`1.5 GiB`; a dash for what is not known."""
    if size is None:
        return "-"
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.3g} MiB"


def short_path(path: str) -> str:
    """The last two parts."""
    return "/".join(Path(path).parts[-2:])


def short_hash(sha256: str) -> str:
    return sha256[:HASH_DIGITS]


def when(moment: str | None) -> str:
    """An ISO time as `2026-11-28 10:05 UTC`."""
    return "-" if not moment else f"{moment[:10]} {moment[11:16]} UTC"


def flat(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of nested mappings, None and empty ones left out."""
    for key, value in data.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, list) and value:
            yield name, ", ".join(map(_plain, value))
        elif value not in (None, [], ""):
            yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {text}" for key, text in flat(value)) + "}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
