"""Pin a repository to a commit, and fetch what is needed of that commit."""

import contextlib
import fnmatch
import glob
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from extend.checkpoint import INDEX_NAME
from extend.errors import CheckpointError, HubError, SpaceError
from extend.hub import HubId, check_repo_id, explaining, hub_api
from extend.inputs.files import choose_files
from extend.inputs.names import HubInput
from extend.model_config import read_json
from extend.output import write_text
from extend.registry import suggest
from extend.untrusted import path_problem

log = logging.getLogger(__name__)
_OFFLINE = ("once the network is there run the same command again, or set HF_HUB_OFFLINE=1 for "
            "what the cache holds")


@dataclass(frozen=True)
class Pinned:
    """A commit of a repository, and which of its files are needed.

    Attributes:
        id: with the commit as revision.
        asked: the revision that led here, such as `main`.
        file: the only one that is meant, None for a whole model or adapter.
        sizes: name -> bytes of the needed files; None where the Hub was not asked.
    """

    id: HubId
    asked: str
    file: str | None
    sizes: dict[str, int | None]

    def __str__(self) -> str:
        return str(HubInput(self.id, self.file))

    def fetch(self) -> Path:
        """Bring the files into the Hub's cache; return the directory, or the one file, there.

        Raises:
            HubError: the Hub refuses, cannot be reached, or sent less than it listed.
            SpaceError: the cache's disk is too small.
        """
        missing = self.missing
        if missing:
            from huggingface_hub import snapshot_download

            self._check_space(missing)
            with explaining(self.id.repo, "fetch it", _OFFLINE):
                snapshot_download(self.id.repo, revision=self.id.revision, library_name="extend",
                                  allow_patterns=[glob.escape(name) for name in missing])
            left = self.missing  # without a network it returns what there is
            if left:
                raise HubError(f"{self.id}: {', '.join(left[:3])} did not come from the Hub; run "
                               "the same command again")
        self._note_asked()
        folder = _snapshot(self.id)
        return folder / self.file if self.file else folder

    def _note_asked(self) -> None:
        """Let the cache know what the revision means now, as others who fetch by its name do."""
        ref, commit = _folder(self.id) / "refs" / self.asked, str(self.id.revision)
        with contextlib.suppress(OSError):  # a cache that may only be read serves as well
            if self.asked != commit and not (ref.is_file() and ref.read_text().strip() == commit):
                ref.parent.mkdir(parents=True, exist_ok=True)
                write_text(ref, commit)

    @property
    def missing(self) -> list[str]:
        """Needed files that are not in the cache."""
        return [name for name in self.sizes if not (_snapshot(self.id) / name).is_file()]

    def _check_space(self, missing: Sequence[str]) -> None:
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        needed, free = sum(self.sizes[name] or 0 for name in missing), shutil.disk_usage(cache).free
        log.info("%s: fetching %d files, %.2f GB", self.id, len(missing), needed / 1e9)
        if needed > free:
            raise SpaceError(f"{self.id}: its files need {needed:,} bytes in {cache}, where "
                             f"{free:,} are free; free space, or set HF_HOME to another disk")


def pin(wanted: HubInput, *, weights: bool = True) -> Pinned:
    """Find the commit that a revision means, and check that what is needed can be fetched.

    With HF_HUB_OFFLINE set, the cache answers in place of the Hub. It also does for a commit all
    of whose files are there, when the Hub does not answer.

    Args:
        weights: False leaves them, and takes what lies beside them: config and tokenizer.

    Raises:
        HubError: no such repository, revision or file, no access to it, or no Hub.
        CheckpointError: a repository without safetensors weights or config.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _pin_cached(wanted, weights)
    try:
        return _pin_online(wanted, weights)
    except HubError as error:
        if not wanted.id.pinned:
            raise
        try:
            found = _pin_cached(wanted, weights)
        except (HubError, CheckpointError):
            raise error from None
        log.warning("%s; all of that commit is in the cache, which is used", error)
        return found


def _pin_online(wanted: HubInput, weights: bool) -> Pinned:
    api, repo = hub_api(), wanted.id.repo
    with explaining(repo, "read it", _OFFLINE):
        try:
            info = api.model_info(repo, revision=wanted.id.revision, files_metadata=True)
        except HubError:
            raise
        except Exception as error:
            _tell_refused(error, wanted)
            raise
        if info.gated:
            api.auth_check(repo)
    if info.id != repo:
        log.warning("%s: is called %s on the Hub now; give that name", repo, info.id)
    sizes = {entry.rfilename: entry.size for entry in info.siblings}
    _check_listing(wanted, info.id, info.sha, sizes)
    return _pinned(wanted, HubId(info.id, info.sha), sizes, weights)


def _check_listing(wanted: HubInput, repo: str, commit: str, names: Iterable[str]) -> None:
    """Refuse an answer whose names would lead out of the cache."""
    check_repo_id(repo)
    if not HubId(repo, commit).pinned:
        raise HubError(f"{wanted.id}: the Hub answered with the commit {str(commit)[:100]!r}, "
                       "which is none; nothing was fetched")
    for name in names:
        if problem := path_problem(name):
            raise HubError(f"{wanted.id}: the Hub lists a file {str(name)[:100]!r}, which "
                           f"{problem}; nothing was fetched")


def _tell_refused(error: Exception, wanted: HubInput) -> None:
    """Say more than the Hub does about names that may be mistyped."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = wanted.id.repo, wanted.id.revision
    if isinstance(error, RevisionNotFoundError):
        refs = hub_api().list_repo_refs(repo)
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        raise HubError(f"{wanted.id}: the repository has no revision {revision!r};"
                       f"{suggest(str(revision), names)} it has {', '.join(names[:10])}, or give "
                       "a commit") from None
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        raise HubError(f"{repo}: there is no such directory here, and no such repository on the "
                       "Hub that this user may see; check the name, and `hf auth whoami` if it is "
                       "private") from None


def _pinned(wanted: HubInput, found: HubId, sizes: dict[str, int | None],
            weights: bool) -> Pinned:
    """Choose the files from a listing."""
    asked = wanted.id.revision or "main"
    if wanted.file is not None:
        return Pinned(found, asked, wanted.file, _parts(wanted, found, sizes))
    try:
        names = choose_files(sizes, lambda: read_json(
            Pinned(found, asked, INDEX_NAME, {INDEX_NAME: sizes[INDEX_NAME]}).fetch()),
            weights=weights)
    except HubError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{found}: {error}") from None
    return Pinned(found, asked, None, {name: sizes[name] for name in names})


def _parts(wanted: HubInput, found: HubId, sizes: dict[str, int | None]) -> dict[str, int | None]:
    """One file, or all parts of a GGUF file that was split."""
    if wanted.file not in sizes:
        kind = f"*.{wanted.file.rpartition('.')[2]}"
        names = [name for name in sizes if fnmatch.fnmatch(name, kind)]
        raise HubError(f"{found}: has no file {wanted.file!r};{suggest(wanted.file, names)}"
                       + (f" it has {', '.join(names[:10])}" if names else f" it has no {kind}"))
    stem, dash, count = wanted.file.partition("-00001-of-")
    return {name: size for name, size in sizes.items()
            if name == wanted.file or (dash and name.startswith(f"{stem}-")
                                       and name.endswith(f"-of-{count}"))}


def _snapshot(found: HubId) -> Path:
    """Where the cache keeps a commit."""
    return _folder(found) / "snapshots" / str(found.revision)


def _folder(found: HubId) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{found.repo.replace('/', '--')}"


def _pin_cached(wanted: HubInput, weights: bool) -> Pinned:
    """Pin to what the cache knows of a revision.

    Raises:
        HubError: it does not know the revision, or lacks files of it.
    """
    revision = wanted.id.revision or "main"
    ref = _folder(wanted.id) / "refs" / revision
    commit = revision if wanted.id.pinned or not ref.is_file() else ref.read_text().strip()
    found = HubId(wanted.id.repo, commit)
    folder = _snapshot(found)
    command = f"`hf download {wanted.id.repo} {wanted.file or ''}".rstrip() + (
        f" --revision {wanted.id.revision}`" if wanted.id.revision else "`")
    if not folder.is_dir():
        raise HubError(f"{wanted.id}: there is no such directory here, and the Hub's cache "
                       f"{_folder(wanted.id)} holds no revision {revision!r} of that repository "
                       f"while HF_HUB_OFFLINE is set; fetch it where there is a network, with "
                       f"{command}")
    names = {path.relative_to(folder).as_posix(): None for path in sorted(folder.rglob("*"))
             if path.is_file()}
    try:
        return _pinned(wanted, found, names, weights)
    except (CheckpointError, HubError) as error:
        raise HubError(f"{error}; the cache may hold only a part of it, and HF_HUB_OFFLINE is set: "
                       f"fetch the rest with {command}") from None
