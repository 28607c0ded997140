"""The folder that is sent: links to the outputs, and copies where a path had to be renamed."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from extend.errors import CheckpointError
from extend.manifest import MANIFEST_NAME, Hashes, hash_file
from extend.output import write_json
from extend.publish.naming import Names
from extend.publish.provenance import ADAPTER, RESULTS, Run, StageOutput
from extend.recipe_text import written_values
from extend.results import RESULTS_NAME, Results
from extend.untrusted import link_problem, yaml_problems

CARD = "README.md"
MANIFESTS = "manifests"
RECIPE = "recipe.yaml"
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".html", ".svg", ".csv")
_TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # of the base; they go with what is made of it
AS_IS, RENAMED, MADE = "as it is", "paths renamed", "made"


@dataclass(frozen=True, slots=True)
class SentFile:
    """A file of the folder: its name there, its size, and what was done to it."""

    name: str
    path: Path
    origin: str

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


class Folder:
    """What will be sent, below `root`.

    Nothing large is copied: a file that stays as it is is a link to where it lies. `known` holds
    the sha256 of files that have been hashed already.
    """

    def __init__(self, root: Path, names: Names):
        self.root, self._names = root, names
        self.files: list[SentFile] = []
        self.known: dict[str, str] = {}

    def add(self, path: Path, name: str) -> SentFile:
        """Link a file, or write a copy that names no local path."""
        if path.suffix in _TEXTS and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            renamed = self._names.apply(text)
            if renamed != text:
                target = self._target(name)
                target.write_text(renamed, encoding="utf-8", errors="surrogateescape")
                return self._note(name, RENAMED)
        self._target(name).symlink_to(path.resolve())
        return self._note(name, AS_IS)

    def write(self, name: str, content: str | Mapping[str, Any], origin: str = MADE) -> SentFile:
        """Write a text, or JSON."""
        target = self._target(name)
        target.unlink(missing_ok=True)
        self.files = [file for file in self.files if file.name != name]
        self.known.pop(name, None)
        if isinstance(content, str):
            target.write_text(content, encoding="utf-8")
        else:
            write_json(target, content)
        return self._note(name, origin)

    def note(self, name: str) -> SentFile:
        """Count a file that was drawn into the folder."""
        return self._note(name, MADE)

    def read_json(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / name).read_text(encoding="utf-8"))

    def hashes(self) -> dict[str, str]:
        """The sha256 of every file."""
        unknown = {file.name: file.path for file in self.files if file.name not in self.known}
        found = Hashes(unknown.values())
        return {**self.known, **{name: found.of(path) for name, path in unknown.items()}}

    def listing(self) -> list[tuple[str, Path]]:
        """(name, path) of all files, sorted by name."""
        return [(file.name, file.path) for file in sorted(self.files, key=lambda f: f.name)]

    def _target(self, name: str) -> Path:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _note(self, name: str, origin: str) -> SentFile:
        self.files.append(SentFile(name, self.root / name, origin))
        return self.files[-1]


def add_output(folder: Folder, output: StageOutput, names: Names, *, read: bool = True) -> None:
    """Add what a stage wrote, its licence files, and its manifest as of what is sent.

    Args:
        read: whether to hash the files, which takes as long as reading them.

    Raises:
        CheckpointError: a file is not what the manifest says: missing, or changed since.
    """
    _check_whole(output, read)
    wanted = [name for name in output.manifest["outputs"] if name != CARD]
    extra = sorted({p.name for pattern in _TERMS for p in output.directory.glob(pattern)}
                   - set(wanted))
    for name in extra:
        if problem := link_problem(output.directory / name, output.directory):
            raise CheckpointError(f"{output.directory / name}: {problem}, and is not sent; put a "
                                  "copy of the file there if it is meant")
    for name in [*wanted, *extra]:
        file = folder.add(output.directory / name, name)
        if file.origin == AS_IS and name in wanted:
            folder.known[name] = output.manifest["outputs"][name]["sha256"]
    if output.kind == ADAPTER:
        _name_base(folder, names)
    folder.write(MANIFEST_NAME, _manifest(folder, output, names), RENAMED)


def _check_whole(output: StageOutput, read: bool) -> None:
    known = {output.directory / name: entry for name, entry in output.manifest["outputs"].items()}
    for path, entry in known.items():
        if problem := link_problem(path, output.directory):
            raise CheckpointError(f"{path}: {problem}, and is not sent; put a copy of the file "
                                  "there if it is meant")
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path}: is missing or was changed since {output.stage} wrote "
                                  f"it, so the manifest is not its; run {output.stage} again")
    hashes = Hashes(known if read else ())
    for path, entry in known.items() if read else ():
        found = hashes.of(path)
        if found != entry["sha256"]:
            raise CheckpointError(f"{path}: has the sha256 {found[:16]}, but {MANIFEST_NAME} says "
                                  f"{entry['sha256'][:16]}; it was changed since, so the manifest "
                                  f"is not its; run {output.stage} again")


def _name_base(folder: Folder, names: Names) -> None:
    """Let PEFT load the commit of the base that the adapter was made for."""
    config = folder.read_json("adapter_config.json")
    base = next((i for i in names.ids.values() if i.repo == config["base_model_name_or_path"]),
                None)
    if base is not None and base.pinned and config.get("revision") != base.revision:
        folder.write("adapter_config.json", {**config, "revision": base.revision}, RENAMED)


def _manifest(folder: Folder, output: StageOutput, names: Names) -> dict[str, Any]:
    """The manifest with public names, the repositories of its inputs, and hashes of what is sent.

    `content_sha256` stays that of the output as the stage wrote it, by which other manifests name
    it.
    """
    record = json.loads(names.apply(json.dumps(public_manifest(output, names))))
    renamed = {file.name: file for file in folder.files if file.origin != AS_IS}
    for name in record["outputs"]:
        if name in renamed:
            path = renamed[name].path
            record["outputs"][name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    record["outputs"].pop(CARD, None)
    return record


def public_manifest(output: StageOutput, names: Names) -> dict[str, Any]:
    """A manifest whose inputs are named as on the Hub."""
    record = json.loads(json.dumps(output.manifest))
    for role, entry in record["inputs"].items():
        known = names.ids.get(str(entry["path"]))
        entry["path"] = names.of(str(entry["path"]))
        if known is not None:
            entry |= {"repo": known.repo, "revision": known.revision}
        record["inputs"][role] = entry
    return {**record, "content_sha256": output.content}


def add_provenance(folder: Folder, run: Run, lineage: Iterable[StageOutput], names: Names) -> None:
    """Add the manifests of the stages before, and the recipe if the run kept one."""
    for output in lineage:
        text = names.apply(json.dumps(public_manifest(output, names), indent=2,
                                      ensure_ascii=False))
        folder.write(f"{MANIFESTS}/{output.name}.json", text + "\n", RENAMED)
    if run.recipe and run.recipe.get("text"):
        folder.write(RECIPE, public_recipe(run.recipe, names), RENAMED)


def public_recipe(recipe: Mapping[str, Any], names: Names) -> str:
    """The recipe's text, comments and all, with public names in place of its paths."""
    text, home = str(recipe["text"]), Path(str(recipe.get("path") or ".")).parent
    try:
        refused = [what for what, _ in yaml_problems(text, yaml.SafeLoader)]
    except (yaml.YAMLError, ValueError) as error:
        refused = [" ".join(str(error).split())]
    if refused:
        raise CheckpointError(f"the recipe that this run kept is not one ({refused[0]}); run it "
                              "again")
    for begin, end, value in written_values(text):
        path = str((home / value).resolve()) if value else ""
        if path in names.local and "/" in path and path != str(home):
            text = text[:begin] + names.of(path) + text[end:]
    return names.apply(text)


def add_results(folder: Folder, results: Sequence[Results]) -> None:
    """Add each results.json below results/LABEL."""
    for result in results:
        folder.add(result.path, f"{RESULTS}/{result.label}/{RESULTS_NAME}")


def git_id(path: Path) -> str:
    """The name that git gives to a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
