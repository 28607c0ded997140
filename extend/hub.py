"""The Hugging Face Hub: how repositories are named, and what its refusals mean to a user.

Everything that talks to the Hub does so inside `explaining`, so that what goes wrong is one message
about what to do, in which no token stands.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.errors import HubError, RecipeError
from extend.secrets import HIDDEN, hide_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(?:/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)
_CACHED = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")
TOKENS_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository, `ORG/NAME`, and the revision of it that is meant, None where unknown."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, role: str = "repository") -> "HubId":
        """Read `ORG/NAME` or `ORG/NAME@REVISION`.

        Raises:
            RecipeError: anything else.
        """
        repo, _, revision = text.partition("@")
        check_repo_id(repo, role)
        if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise RecipeError(f"{role} {repo}: {revision[:100]!r} is no branch, tag or commit")
        return cls(repo, revision or None)

    @classmethod
    def of_cache(cls, path: Path | str) -> "HubId | None":
        """The repository and commit that a path in the Hub's cache belongs to."""
        found = _CACHED.search(str(path))
        return cls(f"{found[1]}/{found[2]}", found[3]) if found else None

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def is_repo_id(text: str) -> bool:
    """Whether the Hub would take it for the name of a repository."""
    try:
        check_repo_id(text)
    except RecipeError:
        return False
    return True


def check_repo_id(repo: str, role: str = "repository") -> None:
    """Raise RecipeError when the Hub would not take the name.

    Source: huggingface_hub, utils/_validators.py (`validate_repo_id`).
    """
    problem = None
    if not _NAME.fullmatch(repo):
        problem = "it is ORG/NAME, of letters, digits, '-', '_' and '.'"
    elif "--" in repo or ".." in repo or repo.endswith((".git", ".ipynb", "-", ".")):
        problem = "it has no '--' or '..' in it, and does not end in '-', '.', .git or .ipynb"
    elif len(repo.partition("/")[2]) > 96:
        problem = f"NAME has at most 96 characters, and this one {len(repo.partition('/')[2])}"
    if problem:
        raise RecipeError(f"{role} {repo!r} is no name on the Hub: {problem}")


def hub_api() -> "HfApi":
    """The client, with the token that `hf auth login` or HF_TOKEN gave."""
    from huggingface_hub import HfApi

    from extend import __version__

    for name in ("httpx", "httpx2"):  # of huggingface_hub 1 and 2: a line for every request
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints what it has to say itself
    return HfApi(library_name="extend", library_version=__version__)


@contextmanager
def explaining(repo: str, doing: str, go_on: str = "run the same command again") -> Iterator[None]:
    """Turn what huggingface_hub raises into HubError.

    Args:
        repo: that the block talks about.
        doing: what it does, such as `upload`.
        go_on: what to do once the network is back.

    Raises:
        HubError: what is wrong and what to do about it.
    """
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError,
            ValueError) as error:
        if isinstance(error, HubError):
            raise
        told = _explain(error, repo, go_on)
        if told is None:
            raise
        raise HubError(f"{repo}: cannot {doing}: {hide_tokens(told)}") from None


def hide_tokens(text: str) -> str:
    """The text with every token in it blotted out."""
    from huggingface_hub import get_token

    token = get_token()
    return hide_secrets(text.replace(token, HIDDEN) if token else text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(error: Exception, repo: str, go_on: str) -> str | None:
    """What to tell the user; None for an error that is not the Hub's."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so nothing is asked of the Hub; unset it"
        if isinstance(cause, LocalTokenNotFoundError):
            return _no_token()
        if isinstance(cause, HfHubHTTPError):
            return _explain_answer(cause, repo)
        if isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            return (f"the network failed ({type(cause).__name__}: {cause}); {go_on}")
    return None


def _no_token() -> str:
    return (f"there is no token; make one that may write at {TOKENS_PAGE}, then run "
            "`hf auth login` or set HF_TOKEN")


def _explain_answer(error: Any, repo: str) -> str:
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(error.response, "status_code", None)
    said = getattr(error, "server_message", None) or str(error).strip().splitlines()[0]
    if isinstance(error, GatedRepoError):
        return (f"{repo} is gated, and this user has not been let in; ask for access at "
                f"https://huggingface.co/{repo}, then run again")
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision; give a branch, a tag or a commit of it"
    if isinstance(error, RepositoryNotFoundError):
        return ("there is no such repository, or it is private and this token may not see it; "
                "check the name, and `hf auth whoami`")
    if status == 401:
        return _no_token() if get_token() is None else (
            f"the token is not accepted ({said}); make a new one at {TOKENS_PAGE}")
    if status == 403:
        return (f"this token may not do that ({said}); take one that may write to "
                f"{repo.partition('/')[0]}, from {TOKENS_PAGE}")
    if status == 429:
        return f"too many requests ({said}); wait some minutes and run again"
    return f"the Hub answered {status} ({said}); run the same command again later"
