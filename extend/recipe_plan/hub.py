"""What the Hub, or its cache on this machine, says of a repository: sizes and config."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_TIMEOUT_SECONDS = 10
_NEEDED = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")


@dataclass(frozen=True, slots=True)
class HubFacts:
    """Of a repository at a revision.

    Attributes:
        directory: its snapshot, where the whole of it is in the cache.
        config: of its config.json; None: not known.
        num_bytes: to download; None: not known.
        problem: why something is not known.
    """

    directory: Path | None = None
    config: Mapping[str, Any] | None = None
    num_bytes: int | None = None
    problem: str = ""


def repository_of(value: str) -> tuple[str, str | None] | None:
    """(id, revision) of an input that names a repository, `org/name` or `org/name@revision`."""
    match = _REPOSITORY.fullmatch(value)
    return (match[1], match[2]) if match else None


def look_at_hub(value: str) -> HubFacts:
    """Ask the cache, then the Hub unless HF_HUB_OFFLINE is set; only config.json is fetched."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = repository_of(value) or (value, None)
    try:
        directory = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        directory = None
    if directory is not None and any(directory.glob("*.safetensors")):
        return HubFacts(directory)
    if constants.HF_HUB_OFFLINE:
        return HubFacts(problem="not in the cache, and HF_HUB_OFFLINE is set")
    return _ask(repository, revision)


def _ask(repository: str, revision: str | None) -> HubFacts:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    size = config = None
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True,
                                  timeout=_TIMEOUT_SECONDS)
        size = sum(file.size or 0 for file in info.siblings or []
                   if file.rfilename.endswith(_NEEDED) and "/" not in file.rfilename)
        file = hf_hub_download(repository, "config.json", revision=revision,
                               etag_timeout=_TIMEOUT_SECONDS)
        config, problem = json.loads(Path(file).read_text(encoding="utf-8")), ""
    except GatedRepoError:
        problem = (f"gated: accept its terms at https://huggingface.co/{repository}, then "
                   "`hf auth login`")
    except (LocalEntryNotFoundError, ValueError, OSError, *_network_errors()) as error:
        problem = f"the Hub does not tell ({str(error).strip().splitlines()[0]})"
    except EntryNotFoundError:
        problem = "it has no config.json"
    return HubFacts(None, config, size, problem)


def _network_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client raises: httpx2 since huggingface_hub 2, httpx before."""
    from huggingface_hub.errors import HfHubHTTPError

    for name in ("httpx2", "httpx"):
        with contextlib.suppress(ImportError):
            return HfHubHTTPError, import_module(name).HTTPError
    return (HfHubHTTPError,)
