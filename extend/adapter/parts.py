"""Factors on disk while an extraction runs, so that memory stays small and a restart goes on.

One safetensors file a parameter, complete or absent, in a directory beside the output. The
directory carries a fingerprint of the inputs and options; one with another fingerprint is emptied.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from extend.adapter_format.peft_files import TensorFile
from extend.checkpoint import TensorInfo, dtype_name, write_safetensors
from extend.errors import CheckpointError, ExtendError, SpaceError
from extend.manifest import versions
from extend.output import remove_leftover, write_json

log = logging.getLogger(__name__)

_FINGERPRINT = "fingerprint.json"
_REPORT = "report"


def fingerprint(stamps: Mapping[str, Any], options: Mapping[str, Any], seed: int,
                device: str) -> str:
    """The sha256 of what decides the factors.

    Args:
        stamps: of the inputs' files (`stamp_files`): their contents are not read for this.
        device: cpu or cuda.
    """
    found = {name: versions()[name] for name in ("extend", "torch")}
    text = json.dumps([stamps, options, seed, found, device], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Parts:
    """The finished parameters of one extraction.

    A context manager. Parts outlive an interruption and a disk that refuses a write, not an error
    that is reported: bad inputs must change first. Several threads may write at once.

    Args:
        out: the output that they are for; they lie in `.NAME.parts` beside it.
        mark: see `fingerprint`; parts with another one are deleted.

    Attributes:
        found: how many parts of an earlier run are there.
    """

    def __init__(self, out: Path | str, mark: str):
        out = Path(out).absolute()
        self.directory = out.with_name(f".{out.name}.parts")
        self._open: TensorFile | None = None
        if self._mark() != mark:
            self.remove()
            self.directory.mkdir(parents=True)
            write_json(self.directory / _FINGERPRINT, {"sha256": mark})
        self.found = len(list(self.directory.glob("*.safetensors")))

    def _mark(self) -> str | None:
        try:
            return json.loads((self.directory / _FINGERPRINT).read_text())["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def path(self, name: str) -> Path:
        return self.directory / f"{quote(name, safe='')}.safetensors"

    def report(self, name: str) -> dict[str, Any] | None:
        """What `write` was given for a parameter; None when it has no whole part."""
        from safetensors import SafetensorError, safe_open

        try:
            TensorFile(self.path(name))
            with safe_open(self.path(name), framework="pt") as file:
                return json.loads(file.metadata()[_REPORT])
        except (CheckpointError, SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, name: str, report: Mapping[str, Any],
              tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors of any names for a parameter, and what is to be said about them.

        Raises:
            CheckpointError: the disk lacks the space.
            OSError: the disk refuses the file.
        """
        infos = [TensorInfo(key, dtype_name(x.dtype), tuple(x.shape)) for key, x in tensors.items()]
        self.close()  # it may be the part that is replaced
        write_safetensors(self.path(name), infos, tensors.__getitem__,
                          {_REPORT: json.dumps(report)}, sync=False)

    def read(self, name: str, key: str) -> torch.Tensor:
        """One tensor of a parameter; the file stays open until another is asked for."""
        file = self._open
        if file is None or file.path != self.path(name):
            file = self._open = TensorFile(self.path(name))
        return file.read(key)

    def close(self) -> None:
        self._open = None

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Delete the parts, unless something cut the work short that is no error of ours."""
        some = any(self.directory.glob("*.safetensors"))
        if kind is None or not some or (issubclass(kind, ExtendError)
                                        and not issubclass(kind, SpaceError)):
            self.remove()
        elif issubclass(kind, (OSError, SpaceError)):
            log.warning("the finished part of the work is kept in %s: make the disk writable or "
                        "free some space, and the same call goes on; or delete it", self.directory)

    def remove(self) -> None:
        """Delete all parts."""
        self.close()
        remove_leftover(self.directory)
