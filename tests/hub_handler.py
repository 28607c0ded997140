"""What the hub of tests/hub.py answers, request by request."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub import USERS, Blob, Fault, Hub, Repo, Request, User, lines_of, make_blob

_API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(.*))?")
_RESOLVE = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_CODES = {"RepoNotFound": "Repository not found", "EntryNotFound": "Entry not found",
          "RevisionNotFound": "Invalid rev id", "GatedRepo": "Access to this model is restricted"}


def front_of(files: dict[str, Blob]) -> dict[str, object] | None:
    """The metadata of README.md."""
    card = files["README.md"].data.decode() if "README.md" in files else ""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str | None = None, message: str | None = None,
                 **headers: str):
        self.status = status
        self.message = message or _CODES.get(code or "", "refused")
        self.headers = {"X-Error-Message": self.message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


class Handler(BaseHTTPRequestHandler):
    """One connection; `server` is the hub."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: in two it waits for an acknowledgement, 40 ms
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer_any(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        fault = self.server.fault(self.command, self.route)
        if fault is not None and fault.status == 0 and not self._is_download():
            return self._cut(self.rfile.read(fault.after))
        self.body = self._read_body()
        try:
            if fault is not None and fault.status:
                raise Refused(fault.status, message="a fault of the test")
            self._dispatch(fault)
        except Refused as refused:
            self._send(refused.status, json.dumps({"error": refused.message}).encode(),
                       refused.headers)

    def _is_download(self) -> bool:
        return self.command == "GET" and _RESOLVE.fullmatch(self.route) is not None

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer_any

    def _dispatch(self, fault: Fault | None) -> None:
        if found := _RESOLVE.fullmatch(self.route):
            return self._resolve(*found.groups(), fault)
        with self.server.lock:
            if found := _API.fullmatch(self.route):
                kind, repo_id, rest = found.groups()
                answer = self._repo_call(self._repo(repo_id, kind), rest or "")
            elif found := _BATCH.fullmatch(self.route):
                answer = self._batch(found[1])
            else:
                answer = self._other_call()
        self._send_json(answer)

    # --- who asks, and for what -------------------------------------------------------------

    def _token(self) -> str | None:
        header = self.headers.get("Authorization") or ""
        return header.removeprefix("Bearer ") or None

    def _user(self) -> User | None:
        token = self._token()
        if token is not None and token not in USERS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return USERS[token] if token else None

    def _repo(self, repo_id: str, kind: str | None = None) -> Repo:
        if repo_id in self.server.moved:
            new = self.path.replace(repo_id, self.server.moved[repo_id])
            raise Refused(307, message="moved", Location=self.server.url + new)
        user, repo = self._user(), self.server.repos.get(repo_id)
        hidden = repo is not None and repo.private and not self._may_write(repo_id, user)
        if repo is None or hidden or kind not in (None, repo.type):
            raise Refused(404 if user else 401, "RepoNotFound")
        return repo

    @staticmethod
    def _may_write(repo_id: str, user: User | None) -> bool:
        return user is not None and repo_id.split("/")[0] in user.namespaces

    def _check_gate(self, repo: Repo) -> None:
        user = self._user()
        if repo.gated and not (user and user.passes_gates):
            raise Refused(403 if user else 401, "GatedRepo")

    def _check_writer(self, repo_id: str) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if not self._may_write(repo_id, user):
            raise Refused(403, message="You don't have the rights to write to the namespace "
                                       f"\"{repo_id.split('/')[0]}\"")

    # --- the calls --------------------------------------------------------------------------

    def _other_call(self) -> object:
        if self.route == "/api/whoami-v2":
            return self._whoami()
        if self.route == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if self.route == "/api/repos/create":
            return self._create()
        if self.route == "/api/repos/delete":
            wanted = json.loads(self.body)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            self._check_writer(repo_id)
            del self.server.repos[self._repo(repo_id).id]
            return {}
        if self.route.startswith("/_lfs/") and self.command == "PUT":
            oid = self.route.removeprefix("/_lfs/")
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400, message=f"the content is not that of {oid}")
            self.server.objects[oid] = self.body
            return {}
        if self.route == "/_verify":
            if json.loads(self.body)["oid"] not in self.server.objects:
                raise Refused(404, message="no such object")
            return {}
        raise Refused(404, message=f"this hub does not know {self.command} {self.route}")

    def _whoami(self) -> object:
        user = self._user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in user.namespaces if name != user.name]
        return {"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs,
                "auth": {"type": "access_token",
                         "accessToken": {"displayName": "test", "role": user.role}}}

    def _create(self) -> object:
        wanted = json.loads(self.body)
        user = self._user()
        repo_id = f"{wanted.get('organization') or (user and user.name)}/{wanted['name']}"
        self._check_writer(repo_id)
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repos:
            raise Refused(409, message="You already created this repo")
        private = wanted.get("private", wanted.get("visibility") == "private")
        repo = Repo(repo_id, wanted.get("type") or "model", bool(private))
        self.server.repos[repo_id] = repo
        attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n"
                             for s in (".safetensors", ".bin"))
        repo.commit({".gitattributes": Blob(attributes.encode(), False)}, "initial commit")
        return {"url": url, "name": repo_id, "id": repo_id}

    def _repo_call(self, repo: Repo, rest: str) -> object:
        verb, _, argument = rest.partition("/")
        if verb == "auth-check":
            self._check_writer(repo.id) if argument == "write" else self._check_gate(repo)
            return {}
        answer = {"": self._info, "revision": self._info, "tree": self._tree, "refs": self._refs,
                  "paths-info": self._paths_info, "commits": self._commits}.get(verb)
        if answer is None:
            self._check_writer(repo.id)
            answer = {"preupload": self._preupload, "commit": self._commit, "tag": self._tag,
                      "branch": self._branch, "settings": self._settings}.get(verb)
        if answer is None:
            raise Refused(404, message=f"this hub does not know {self.command} {self.route}")
        return answer(repo, argument)

    def _paths_info(self, repo: Repo, revision: str) -> object:
        files = repo.commits[self._sha(repo, revision)]
        return [files[path].entry(path) for path in self._paths() if path in files]

    def _commits(self, repo: Repo, _: str) -> object:
        return [{"id": sha, "title": repo.messages[sha], "message": "", "authors": [],
                 "date": "2026-01-01T00:00:00.000Z"} for sha in reversed(repo.commits)]

    def _settings(self, repo: Repo, _: str) -> object:
        wanted = json.loads(self.body)
        repo.private = wanted.get("private", wanted.get("visibility") == "private")
        return {}

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.sha(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound")
        return sha

    def _info(self, repo: Repo, revision: str) -> object:
        sha = self._sha(repo, revision or "main")
        siblings = []
        for path, blob in repo.commits[sha].items():
            entry = blob.entry(path)
            lfs = {"lfs": {"sha256": blob.sha256, "size": entry["size"],
                           "pointerSize": len(blob.pointer)}} if blob.lfs else {}
            detail = {"size": entry["size"], "blobId": entry["oid"], **lfs}
            siblings.append({"rfilename": path, **(detail if "blobs" in self.query else {})})
        return {"_id": "0" * 24, "id": repo.id, "modelId": repo.id, "sha": sha, "tags": [],
                "private": repo.private, "gated": "auto" if repo.gated else False,
                "disabled": False, "downloads": 0, "likes": 0, "siblings": siblings,
                "author": repo.id.split("/")[0], "createdAt": "2026-01-01T00:00:00.000Z",
                "lastModified": "2026-01-01T00:00:00.000Z",
                "cardData": front_of(repo.commits[sha])}

    def _tree(self, repo: Repo, argument: str) -> list[dict[str, object]]:
        revision, _, folder = argument.partition("/")
        files = repo.commits[self._sha(repo, revision)]
        inside = {p: blob for p, blob in files.items() if p.startswith(folder and folder + "/")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound")
        recursive = self.query.get("recursive", ["False"])[0].lower() == "true"
        folders = {p[:i] for p in inside for i, c in enumerate(p) if c == "/" and i > len(folder)}
        listed = [{"type": "directory", "path": f, "size": 0,
                   "oid": hashlib.sha1(f.encode()).hexdigest()} for f in sorted(folders)]
        listed += [blob.entry(path) for path, blob in inside.items()]
        depth = folder.count("/") + bool(folder)
        return [e for e in listed if recursive or str(e["path"]).count("/") == depth]

    def _paths(self) -> list[str]:
        if self.body.startswith(b"{"):
            return list(json.loads(self.body)["paths"])
        return parse_qs(self.body.decode()).get("paths", [])

    def _refs(self, repo: Repo, _: str) -> object:
        named = {"branches": "heads", "tags": "tags"}
        found = {key: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": sha}
                       for name, sha in repo.refs.items() if (name in repo.tags) == (key == "tags")]
                 for key, place in named.items()}
        return {**found, "converts": []}

    def _preupload(self, repo: Repo, revision: str) -> object:
        known = repo.commits[self._sha(repo, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = make_blob(path, b"x").lfs
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular",
                            "shouldIgnore": False,
                            **({"oid": known[path].etag} if path in known else {})})
        return {"files": answers, "commitOid": repo.sha(revision)}

    def _commit(self, repo: Repo, branch: str) -> object:
        head = self._sha(repo, branch)
        files, message = dict(repo.commits[head]), ""
        for line in lines_of(self.body):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise Refused(412, message="The branch has moved")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, message=f"LFS pointer to a missing {value['oid']}")
                files[value["path"]] = Blob(self.server.objects[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                files = {p: b for p, b in files.items() if not p.startswith(value["path"] + "/")}
        sha = repo.commit(files, message, branch)
        return {"success": True, "commitOid": sha, "hookOutput": "",
                "commitUrl": f"{self.server.url}/{repo.id}/commit/{sha}"}

    def _tag(self, repo: Repo, argument: str) -> object:
        if self.command == "DELETE":
            repo.tags.discard(argument)
            return self._drop(repo, argument)
        name = json.loads(self.body)["tag"]
        repo.tags.add(name)
        return self._name_commit(repo, name, argument)

    def _branch(self, repo: Repo, name: str) -> object:
        if self.command == "DELETE":
            return self._drop(repo, name)
        return self._name_commit(repo, name,
                                 json.loads(self.body or b"{}").get("startingPoint", "main"))

    @staticmethod
    def _drop(repo: Repo, name: str) -> object:
        del repo.refs[name]
        return {}

    def _name_commit(self, repo: Repo, name: str, start: str) -> object:
        if name in repo.refs:
            raise Refused(409, message=f"{name} exists already")
        repo.refs[name] = self._sha(repo, start)
        return {}

    def _batch(self, repo_id: str) -> object:
        repo = self._repo(repo_id)
        self._check_writer(repo.id)
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/_lfs/{item['oid']}"},
                                    "verify": {"href": f"{self.server.url}/_verify"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _resolve(self, repo_id: str, revision: str, path: str, fault: Fault | None) -> None:
        repo = self._repo(repo_id)
        self._check_gate(repo)
        sha = self._sha(repo, revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status, data = 200, blob.data
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(blob.data) - 1)
            status, data = 206, blob.data[first:last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
        self._send(status, data, headers, cut_after=fault.after if fault else None)

    # --- the wire ---------------------------------------------------------------------------

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send_json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str],
              cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut_after])
        if cut_after is not None:
            return self._cut()
        self._note(status)

    def _cut(self, *_: bytes) -> None:
        """Hang up in the middle, as a network that is lost does."""
        self._note(0)
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def _note(self, status: int) -> None:
        self.server.requests.append(Request(self.command, self.route, status, self._token()))
