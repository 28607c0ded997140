"""Factors on disk while an extraction runs, so that memory stays small and a restart goes on.

One safetensors file a parameter, complete or absent, in a directory beside the output. The
directory carries a fingerprint of the inputs and options; one with another fingerprint is emptied.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from extend.adapter_format.peft_files import TensorFile
from extend.checkpoint import TensorInfo, dtype_name, write_safetensors
from extend.errors import CheckpointError, ExtendError
from extend.output import remove_directory, write_json

_FINGERPRINT = "fingerprint.json"
_REPORT = "report"


def fingerprint(record: Mapping[str, Any], **more: Any) -> str:
    """The sha256 of what decides the factors.

    Args:
        record: of the stage's manifest: the contents of the inputs, the options and the seed.
        more: anything else that does.
    """
    inputs = {role: entry["sha256"] for role, entry in record["inputs"].items()}
    versions = {name: record["versions"][name] for name in ("extend", "torch")}
    text = json.dumps([inputs, record["options"], record["seed"], versions, more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Parts:
    """The finished parameters of one extraction.

    A context manager. Parts outlive an interruption, not an error that is reported: bad inputs must
    change first, and on a full disk they would be in the way.

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
        partial = self.directory / "partial"
        write_safetensors(partial, infos, tensors.__getitem__, {_REPORT: json.dumps(report)})
        self.close()  # it may be the part that is replaced
        partial.replace(self.path(name))

    def read(self, name: str, key: str) -> torch.Tensor:
        """One tensor of a parameter; the file stays open until another is asked for."""
        if self._open is None or self._open.path != self.path(name):
            self._open = TensorFile(self.path(name))
        return self._open.read(key)

    def close(self) -> None:
        self._open = None

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Delete the parts, unless something cut the work short that is no error of ours."""
        reported = kind is None or issubclass(kind, (ExtendError, OSError))
        if reported or not any(self.directory.glob("*.safetensors")):
            self.remove()

    def remove(self) -> None:
        """Delete all parts."""
        self.close()
        remove_directory(self.directory)
