"""Would a file that is to be sent tell what is private: paths, users, hosts, tokens?

Texts are read whole; of weights the header, whose metadata other programs fill with paths. What the
model said and what a vocabulary lists is held only against what is known of this machine, not
against the look of a path: both are full of things that look like one.
"""

import getpass
import json
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from extend.checkpoint import read_header
from extend.errors import RecipeError
from extend.secrets import LOOKS

_PLACES = ("home", "Users", "root", "tmp", "mnt", "var", "opt", "srv", "scratch", "work",
           "workspace", "media", "private", "Volumes", "content", "kaggle", "gpfs", "lustre",
           "nfs", "fsx", "data", "datasets", "models", "checkpoints", "runs")
_PATTERNS = {
    "a local path": re.compile(
        rf"(?<![\w.:/<>\-@*])/(?:{'|'.join(_PLACES)})/[\w.@~+-][\w.@~+/-]*"
        r"|(?<![\w/])~/[\w.@+/-]+|\b[A-Za-z]:\\{1,2}(?:Users|Documents)[\\\w .-]+"
        r"|\bfile://[^\s\"'<>]+"),
    "a token": LOOKS}
_BINARIES = (".png", ".model", ".gguf", ".bin", ".pt")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
                 "extend_vocabulary.json", "vocab.txt")
_SPOKEN = re.compile(r'"(?:predicted|answer|answers|response|text|prompt)"\s*:\s*'
                     r'(?:"(?:[^"\\]|\\.)*"|\[(?:\s*"(?:[^"\\]|\\.)*"\s*,?)*\s*\])')
_COMMON = {"root", "user", "users", "admin", "ubuntu", "runner", "home", "docker", "model",
           "models", "data", "test", "localhost", "extend", "base", "long", "adapter", "main"}
_MOST = 8


@dataclass(frozen=True, slots=True)
class Leak:
    """Something private in a file; `text` is what was found, blotted out where it is a token."""

    file: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}, {self.text}"


class Privacy:
    """What must not be sent.

    Args:
        paths: of this machine that are known, such as those in the manifests.
        allow: texts that may be sent although they look private; never a token.
        public: names that are public anyway, such as the repository's.
    """

    def __init__(self, paths: Sequence[str], allow: Sequence[str] = (),
                 public: Sequence[str] = ()):
        self._allow = tuple(allow)
        known = {path: "a local path" for path in [*paths, str(Path.home()), str(Path.cwd())]
                 if path.count("/") + path.count("\\") > 1}
        for name, kind in ((_user(), "the name of this user"), (_host(), "the name of this host")):
            if len(name) > 3 and name.lower() not in _COMMON and name not in " ".join(public):
                known[name] = kind
        token = _token()
        self._known = {**known, **({token: "a token"} if token else {})}

    def search(self, files: Sequence[tuple[str, Path]]) -> list[Leak]:
        """All leaks in files, each given as its name in the repository and where it lies."""
        return [leak for name, path in files for leak in self._in_file(name, path)]

    def require(self, files: Sequence[tuple[str, Path]]) -> None:
        """Raise RecipeError when a file holds something private."""
        leaks = self.search(files)
        if leaks:
            more = f"\nand {len(leaks) - _MOST} more" if len(leaks) > _MOST else ""
            raise RecipeError(
                "what is to be sent holds something private:\n"
                + "\n".join(str(leak) for leak in leaks[:_MOST]) + more
                + "\nname models by their repository (--base-id, --id), change the file, or let a "
                  "text through with --allow TEXT")

    def _in_file(self, name: str, path: Path) -> Iterator[Leak]:
        vocabulary = Path(name).name in _VOCABULARIES
        if path.suffix == ".safetensors":
            yield from self._in_text(name, _metadata(path), guess=True)
        elif path.suffix not in _BINARIES:
            text = path.read_text(encoding="utf-8", errors="replace")
            yield from self._in_text(name, text, guess=not vocabulary)

    def _in_text(self, name: str, text: str, *, guess: bool) -> Iterator[Leak]:
        for known, kind in self._known.items():
            if known in text:
                pattern = re.compile(rf"(?<![\w-]){re.escape(known)}(?![\w-])")
                yield from self._matches(name, text, pattern, kind)
        if guess:
            spoken = _SPOKEN.sub(lambda found: "\n" * found[0].count("\n"), text)
            for kind, pattern in _PATTERNS.items():
                yield from self._matches(name, spoken, pattern, kind)

    def _matches(self, name: str, text: str, pattern: re.Pattern[str],
                 kind: str) -> Iterator[Leak]:
        for found in pattern.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            if kind == "a token":
                yield Leak(name, line, kind, f"{found[0][:5]}...")
            elif not any(found[0] in allowed for allowed in self._allow):
                yield Leak(name, line, kind, found[0])


def _metadata(path: Path) -> str:
    """What stands beside the tensors in a safetensors file's header."""
    read_header(path)  # made sure to be one
    with path.open("rb") as file:
        size, = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return json.dumps(header.get("__metadata__", {}), ensure_ascii=False)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _host() -> str:
    return socket.gethostname()


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()
