"""A hub of our own on the loopback interface, as far as huggingface_hub 1.x and 2.x talk to one.

    def test_download(hub):                        # fixture of tests/conftest.py
        sha = hub.add("lab/base", {"config.json": b"{}"}, gated=True)
        hub.fail("GET", "/resolve/", times=2)      # two answers 503, then the file
        snapshot_download("lab/base")              # in this process: it is pointed at this hub
        run_python([...], env=hub.environment(tmp_path))    # in a process of its own

It knows repositories of models and data sets, private and gated ones, commits with LFS, tags and
branches, and tokens that may write, only read, or nothing. What it stores is in memory.

Source: the requests and errors of huggingface_hub 1.x and 2.x (`hf_api.py`, `_commit_api.py`,
`lfs.py`, `utils/_http.py`), and the Git LFS batch API.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

WRITER, READER, STRANGER = "hf_dummy_writer", "hf_dummy_reader", "hf_dummy_stranger"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".png", ".parquet")


@dataclass(frozen=True)
class User:
    """Who a token belongs to: `namespaces` it may write to, and whether gates let it in."""

    name: str
    namespaces: tuple[str, ...] = ()
    passes_gates: bool = True
    role: str = "write"


USERS = {WRITER: User("tester", ("tester", "lab")),
         READER: User("reader", role="read"),
         STRANGER: User("stranger", ("stranger",), passes_gates=False)}


@dataclass(frozen=True)
class Blob:
    """A file as git keeps it: its content, or with `lfs` a pointer to it."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
                f"size {len(self.data)}\n").encode()

    @property
    def git_id(self) -> str:
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id

    def entry(self, path: str) -> dict[str, Any]:
        """As a listing shows it."""
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data),
                       "pointerSize": len(self.pointer)}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.git_id, **lfs}


@dataclass
class Repo:
    """A repository: `commits` maps a sha to its files, `refs` a branch or tag to a sha."""

    id: str
    type: str = "model"
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, Blob], message: str, branch: str = "main") -> str:
        text = f"{self.id}\n{len(self.commits)}\n{message}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[branch] = files, message, sha
        return sha

    def sha(self, revision: str) -> str | None:
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """Path -> content at the head of main."""
        return {path: blob.data for path, blob in self.commits[self.refs["main"]].items()}


@dataclass
class Fault:
    """The next `times` requests that fit get `status`; 0 cuts the connection after `after` bytes
    of the request's body (upload) or of the answer (download)."""

    method: str
    pattern: str
    times: int
    status: int
    after: int


@dataclass(frozen=True)
class Request:
    """A request that was answered; status 0 for one that was cut."""

    method: str
    path: str
    status: int
    token: str | None


class Hub(ThreadingHTTPServer):
    """The server with all it stores; `url` is its address, `requests` what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        from tests.hub_handler import Handler

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.waits: list[float] = []
        self.moved: dict[str, str] = {}  # old name -> new

    def reset(self) -> None:
        """Forget everything: repositories, requests, faults."""
        for kept in (self.repos, self.objects, self.requests, self.faults, self.waits,
                     self.moved):
            kept.clear()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests; say nothing."""

    def add(self, repo_id: str, files: Mapping[str, bytes | str] | Path, *, type: str = "model",
            private: bool = False, gated: bool = False, tag: str | None = None) -> str:
        """Put a repository there, or a commit on its main; return the commit's sha."""
        if isinstance(files, Path):
            files = {f.relative_to(files).as_posix(): f.read_bytes()
                     for f in sorted(files.rglob("*")) if f.is_file()}
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id, type, private, gated))
            repo.private, repo.gated = private, gated
            blobs = {path: make_blob(path, data.encode() if isinstance(data, str) else data)
                     for path, data in files.items()}
            known = repo.commits[repo.refs["main"]] if repo.commits else {}
            sha = repo.commit({**known, **blobs}, f"add {', '.join(files)}")
            if tag:
                repo.refs[tag] = sha
                repo.tags.add(tag)
        return sha

    def fail(self, method: str, pattern: str, *, times: int = 1, status: int = 503,
             after: int = 0) -> None:
        """Let the next requests of `method` whose path contains `pattern` (an expression) fail."""
        self.faults.append(Fault(method, pattern, times, status, after))

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request runs into, which is used up once more."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, pattern: str) -> int:
        """How many requests that fit were answered with success."""
        return sum(r.method == method and 200 <= r.status < 300
                   and re.search(pattern, r.path) is not None for r in self.requests)

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """Environment of a process whose huggingface_hub talks to this hub."""
        env = {name: value for name, value in os.environ.items()
               if not name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE"))}
        return {**env, "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home),
                "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}

    def connect(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = WRITER) -> None:
        """Point huggingface_hub of this process, imported already or not, at this hub.

        Its waits between tries are noted in `waits` in place of being waited.
        """
        from huggingface_hub import constants, file_download, hf_api
        from huggingface_hub.utils import _http

        for name, value in {
                "ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                "HUGGINGFACE_CO_URL_TEMPLATE": self.url
                + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_DISABLE_TELEMETRY": True, "HF_HOME": str(home),
                "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
                "HF_STORED_TOKENS_PATH": str(home / "stored_tokens")}.items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", self.url)
        unhurried = SimpleNamespace(**{**vars(time), "sleep": self.waits.append})
        for module in (_http, file_download):
            patch.setattr(module, "time", unhurried)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_ENDPOINT", self.url)
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)


def make_blob(path: str, data: bytes) -> Blob:
    """The file as this hub stores it: weights and pictures through LFS, empty files never."""
    return Blob(data, lfs=path.endswith(LFS_SUFFIXES) and bool(data))


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05},
                              daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lines_of(body: bytes) -> list[dict[str, Any]]:
    """The JSON lines of a commit."""
    return [json.loads(line) for line in body.splitlines() if line.strip()]


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


@pytest.fixture
def hub(hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The session's hub, empty, with this process' huggingface_hub pointed at it."""
    hub_server.reset()
    hub_server.connect(monkeypatch, tmp_path / "hf-home")
    return hub_server
