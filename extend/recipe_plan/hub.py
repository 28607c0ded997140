"""What the Hub, or its cache on this machine, says of a repository: sizes and config."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extend.errors import CheckpointError, HubError
from extend.inputs import HubInput, Pinned, pin
from extend.model_config import read_json

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class HubFacts:
    """Of a repository, or one file of it.

    Attributes:
        path: where the whole of it is, if that is in the cache.
        config: of its config.json; None: not known.
        num_bytes, download_bytes: of what is needed, and of what of that is not here; None: not
            known.
        problem: why something is not known.
    """

    path: Path | None = None
    config: Mapping[str, Any] | None = None
    num_bytes: int | None = None
    download_bytes: int | None = None
    problem: str = ""


def look_at_hub(wanted: HubInput) -> HubFacts:
    """Ask the cache, or the Hub unless HF_HUB_OFFLINE is set; no weights are fetched."""
    try:
        pinned = pin(wanted)
        if not pinned.missing:
            return HubFacts(pinned.fetch())
    except (HubError, CheckpointError) as error:
        return HubFacts(problem=str(error))
    size = sum(size or 0 for size in pinned.sizes.values())
    found = HubFacts(num_bytes=size, download_bytes=sum(
        pinned.sizes[name] or 0 for name in pinned.missing))
    if _CONFIG not in pinned.sizes:
        return found
    try:
        file = Pinned(pinned.id, pinned.asked, _CONFIG, {_CONFIG: pinned.sizes[_CONFIG]}).fetch()
        return replace(found, config=read_json(file))
    except (HubError, CheckpointError) as error:
        return replace(found, problem=str(error))
