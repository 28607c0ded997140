"""The models that something was made from: are they those on the Hub, and at which commit?"""

from pathlib import Path
from typing import TYPE_CHECKING

from extend.errors import HubError
from extend.hub import HubId, explaining, hub_api
from extend.manifest import Hashes
from extend.publish.naming import Names

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def pin_bases(names: Names) -> Names:
    """Give every base its commit, where that can be known.

    It is the commit of the revision that was given. Without one it is the newest, if the weights
    there are those that were read here, by their sha256; where nothing can be compared, it stays
    unknown.

    Raises:
        HubError: a repository is not there, cannot be asked, or holds other weights than those
            that were read.
    """
    api = hub_api()
    found = {path: _pin(api, Path(path), names.ids[path]) for path in names.bases}
    return names.pinned(found)


def _pin(api: "HfApi", path: Path, known: HubId) -> HubId:
    with explaining(known.repo, "look at the base"):
        info = api.model_info(known.repo, revision=known.revision)
        ours = {file.name: file for file in sorted(path.glob("*.safetensors"))}
        theirs = {entry.path: entry.lfs for entry in api.list_repo_tree(
            known.repo, revision=info.sha) if getattr(entry, "lfs", None)} if ours else {}
    commit, both = str(info.sha), sorted(set(ours) & set(theirs))
    hashes = Hashes(ours[name] for name in both)
    for name in both:
        if hashes.of(ours[name]) != theirs[name].sha256:
            raise HubError(
                f"{known.repo}: is not the model at {path}: {name} has {theirs[name].size:,} bytes "
                f"and sha256 {theirs[name].sha256[:16]} at commit {commit[:12]}, but "
                f"{ours[name].stat().st_size:,} bytes and {hashes.of(ours[name])[:16]} here; give "
                "another id, or the commit as ORG/NAME@COMMIT")
    same = bool(ours) and set(both) == set(ours)
    return HubId(known.repo, commit) if same or known.revision else known
