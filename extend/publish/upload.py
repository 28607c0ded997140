"""Bring a folder to the Hub: create, send what is not there, compare every file's hash, tag."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.errors import HubError
from extend.hub import TOKENS_PAGE, explaining, hub_api
from extend.publish.files import Folder, git_id
from extend.publish.provenance import RESULTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
_GO_ON = "what has arrived is kept: run the same command again, and only the rest is sent"
_MADE_BY_THE_HUB = ".gitattributes"
_MOST_LISTED = 6


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What the repository holds now.

    Attributes:
        sent: names of the files that were not there before.
        others: what it holds beside, from before.
    """

    url: str
    commit: str
    private: bool
    sent: Sequence[str]
    others: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Remote:
    """A repository's state: `files` maps a name to the hash that the Hub shows of it."""

    exists: bool
    private: bool
    commit: str | None
    files: Mapping[str, str]
    tags: Mapping[str, str]


class Destination:
    """A repository that a folder is sent to.

    Args:
        repo: ORG/NAME.
        kind: of what is published; results go to a repository of data sets.
        public: whether everybody may see it.
        replace: whether what else it holds may be replaced.
        tag: name for the commit.
        message: of the commit.
    """

    def __init__(self, repo: str, kind: str, *, public: bool, replace: bool, tag: str | None,
                 message: str):
        self.repo, self.public, self.replace = repo, public, replace
        self.tag, self.message = tag, message
        self.type = "dataset" if kind == RESULTS else "model"
        self._api: HfApi = hub_api()

    @property
    def url(self) -> str:
        place = "datasets/" if self.type == "dataset" else ""
        return f"{self._api.endpoint}/{place}{self.repo}"

    def check_token(self) -> None:
        """Raise HubError when there is no token, or one that may not write to the namespace."""
        from huggingface_hub import get_token

        if get_token() is None:
            raise HubError(f"{self.repo}: there is no token; make one that may write at "
                           f"{TOKENS_PAGE}, then run `hf auth login` or set HF_TOKEN")
        with explaining(self.repo, "see whose token it is"):
            user = self._api.whoami()
        namespace = self.repo.partition("/")[0]
        may = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise HubError(f"{self.repo}: the token of {user['name']} may only read; make one that "
                           f"may write at {TOKENS_PAGE}")
        if namespace not in may:
            raise HubError(f"{self.repo}: {user['name']} may write to {', '.join(may)}, but not to "
                           f"{namespace}; choose another name, or another token")

    def send(self, folder: Folder) -> Uploaded:
        """Send a folder, and compare; `check_token` comes first.

        Raises:
            HubError: the Hub refuses or is not reached; the repository holds something else; or
                what it holds in the end is not what was sent.
        """
        ours = self._hashes(folder)
        before = self._look()
        self._check_free(before, ours)
        missing = [name for name, hashes in ours.items() if before.files.get(name) not in hashes]
        commit = self._upload(folder, before) if missing or (self._extra(before, ours) and \
            self.replace) else str(before.commit)
        after = self._verify(ours, commit)
        self._finish(before, commit)
        return Uploaded(self.url, commit, before.private and not self.public, missing,
                        self._extra(after, ours))

    def _hashes(self, folder: Folder) -> dict[str, tuple[str, str]]:
        """The two names that the Hub may give to each file's content: sha256, or git's."""
        sha256 = folder.hashes()
        return {name: (sha256[name], "" if path.suffix == ".safetensors" else git_id(path))
                for name, path in folder.listing()}

    def _look(self) -> _Remote:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with explaining(self.repo, "look at it"):
            try:
                info = self._api.repo_info(self.repo, repo_type=self.type)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return _Remote(False, True, None, {}, {})
            refs = self._api.list_repo_refs(self.repo, repo_type=self.type)
            return _Remote(True, bool(info.private), info.sha, self._listing(str(info.sha)),
                           {ref.name: ref.target_commit for ref in refs.tags})

    def _listing(self, revision: str) -> dict[str, str]:
        tree = self._api.list_repo_tree(self.repo, recursive=True, revision=revision,
                                        repo_type=self.type)
        return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
                for entry in tree if hasattr(entry, "blob_id")}

    def _check_free(self, remote: _Remote, ours: Mapping[str, tuple[str, str]]) -> None:
        if remote.exists and not remote.private and not self.public:
            raise HubError(f"{self.repo}: is public, so what is sent would be at once; add "
                           "--public, or choose another name")
        differing = [name for name, found in remote.files.items()
                     if name in ours and found not in ours[name]]
        foreign = [*self._extra(remote, ours), *differing]
        if self.tag in remote.tags and (foreign or remote.tags[self.tag] != remote.commit
                                        or set(ours) - set(remote.files)):
            raise HubError(f"{self.repo}: has the tag {self.tag} already, at commit "
                           f"{remote.tags[self.tag][:12]}; choose another --tag")
        if foreign and not self.replace and not _same_weights(remote.files, ours):
            raise HubError(f"{self.repo}: holds something else: {_list(foreign)}; choose another "
                           "name, or add --replace (its history keeps what is replaced)")

    @staticmethod
    def _extra(remote: _Remote, ours: Mapping[str, Any]) -> list[str]:
        return sorted(set(remote.files) - set(ours) - {_MADE_BY_THE_HUB})

    def _upload(self, folder: Folder, before: _Remote) -> str:
        with explaining(self.repo, "create it"):
            if not before.exists:
                self._api.create_repo(self.repo, repo_type=self.type, private=True, exist_ok=True)
        logger.info("sending %d files to %s", len(folder.files), self.url)
        try:
            with explaining(self.repo, "send the files", _GO_ON):
                return str(self._api.upload_folder(
                    repo_id=self.repo, repo_type=self.type, folder_path=folder.root,
                    commit_message=self.message,
                    delete_patterns=["*"] if self.replace and before.files else None).oid)
        except ValueError as error:  # how huggingface_hub says that the Hub refuses the metadata
            raise HubError(f"{self.repo}: the Hub does not take the card: {error}") from None

    def _verify(self, ours: Mapping[str, tuple[str, str]], commit: str) -> _Remote:
        with explaining(self.repo, "compare what has arrived", _GO_ON):
            found = self._listing(commit)
        wrong = [name for name, hashes in ours.items() if found.get(name) not in hashes]
        if wrong:
            raise HubError(f"{self.repo}: at commit {commit[:12]} {len(wrong)} files are not what "
                           f"was sent: {_list(wrong)}; run the same command again")
        return _Remote(True, not self.public, commit, found, {})

    def _finish(self, before: _Remote, commit: str) -> None:
        with explaining(self.repo, "tag the commit"):
            if self.tag and self.tag not in before.tags:
                self._api.create_tag(self.repo, tag=self.tag, revision=commit,
                                     repo_type=self.type)
        with explaining(self.repo, "make it public"):
            if self.public and before.private:
                self._api.update_repo_settings(self.repo, private=False, repo_type=self.type)


def _same_weights(remote: Mapping[str, str], ours: Mapping[str, tuple[str, str]]) -> bool:
    """Whether the repository holds this output already, maybe in part and with another card."""
    weights = {name: found for name, found in remote.items() if Path(name).suffix == ".safetensors"}
    return bool(weights) and all(found in ours.get(name, ()) for name, found in weights.items())


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
