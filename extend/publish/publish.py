"""The publish stage: gather, name, write the card, look for what is private, send, compare."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from extend.errors import RecipeError
from extend.hub import HubId, check_repo_id
from extend.lock import holding
from extend.manifest import Manifest
from extend.output import atomic_directory, require_new, write_json
from extend.publish.bases import pin_bases
from extend.publish.card import Subject, write_card
from extend.publish.files import CARD, Folder, SentFile, add_output, add_provenance, add_results
from extend.publish.leaks import Privacy
from extend.publish.metadata import settle_terms
from extend.publish.naming import Names, name_all
from extend.publish.provenance import MODEL, RESULTS, Run, StageOutput, find
from extend.publish.upload import Destination, Uploaded
from extend.publish_options import PublishOptions
from extend.results import Results, read_results

RECORD = "published.json"


@dataclass(frozen=True, slots=True)
class Publication:
    """What was published, or with a dry run would be.

    Attributes:
        files: name, bytes and what was done to each file.
        card: the whole README.md.
        uploaded: None after a dry run.
    """

    repo: str
    kind: str
    files: Sequence[tuple[str, int, str]]
    card: str
    public: bool
    uploaded: Uploaded | None
    tag: str | None = None

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size, _ in self.files)

    def to_json(self) -> dict[str, Any]:
        done = self.uploaded
        sent = set(done.sent) if done else set()
        return {"output": done.url if done else None, "repo": self.repo, "kind": self.kind,
                "commit": done.commit if done else None, "tag": self.tag,
                "private": done.private if done else not self.public, "dry_run": done is None,
                "files": [{"name": name, "bytes": size, "origin": origin,
                           **({"sent": name in sent} if done else {})}
                          for name, size, origin in self.files],
                "bytes": self.total_bytes, "others": list(done.others) if done else [],
                "card": self.card}

    def to_text(self) -> str:
        """The address; after a dry run the files and the card."""
        if self.uploaded:
            return self.uploaded.url
        place = "data sets" if self.kind == RESULTS else "a model"
        seen = "public" if self.public else "private"
        width = max(len(name) for name, _, _ in self.files)
        lines = [f"would go to {self.repo}, a {seen} repository of {place}:"]
        lines += [f"  {name:<{width}}  {size:>14,}  {origin}" for name, size, origin in self.files]
        lines += [f"{len(self.files)} files, {self.total_bytes:,} bytes; nothing was sent", "",
                  self.card]
        return "\n".join(lines)


def publish(source: Path | str, to: str, *, out: Path | str | None = None,
            overwrite: bool = False, **options: Any) -> Publication:
    """Publish an adapter, a model or results on the Hugging Face Hub.

    What is sent: the files that the stage's manifest lists, the manifests of the stages before it,
    the recipe, the results of evaluations, pictures of them, and a card that is made from these
    alone. Local paths in them become repositories, names of stages, or names of files; what else
    looks private (paths, users, hosts, tokens) is refused. What is there already is not sent
    again, and in the end every file's hash is compared with the Hub's listing.

    Args:
        source: output of a stage, or the directory of a run.
        to: ORG/NAME; results become a repository of data sets. It is made, private, if missing.
        out: directory for a record of what was published.
        overwrite: replace `out` if it exists.
        options: see `extend.publish_options.PublishOptions`.

    Raises:
        RecipeError: an option that is wrong, a model without a name on the Hub, no licence, or
            something private in what would be sent.
        CheckpointError: no output of a stage, or one that was changed since.
        HubError: no token, no permission, gated, offline, the network lost, or a repository that
            holds something else.
    """
    settled = _options({"source": str(source), "to": to, **options})
    check_repo_id(settled.to)
    if out is None:
        return _publish(settled)[0]
    with holding(out):
        require_new(out, overwrite=overwrite)
        publication, outputs = _publish(settled)
        _record(Path(out), settled, publication, outputs, overwrite)
    return publication


def _options(given: Mapping[str, Any]) -> PublishOptions:
    try:
        return PublishOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"publish: {where}: {first['msg']}; it takes "
                          f"{', '.join(PublishOptions.model_fields)}") from None


def check_destination(options: PublishOptions) -> None:
    """See that the token may write to where something will be published, before it is made.

    Raises:
        RecipeError: a name that the Hub would not take.
        HubError: no token, one that may not write there, offline, or no network.
    """
    check_repo_id(options.to)
    if not options.dry_run:
        _destination(options, options.kind or MODEL, "").check_token()


def _destination(options: PublishOptions, kind: str, name: str) -> Destination:
    return Destination(options.to, kind, public=options.public, replace=options.replace,
                       tag=options.tag, message=options.message or f"Publish {name} with extend")


def _publish(options: PublishOptions) -> tuple[Publication, list[StageOutput]]:
    run, outputs = find(Path(options.source), options.kind)
    kind = str(outputs[-1].kind)
    destination = _destination(options, kind, outputs[-1].name)
    if not options.dry_run:
        destination.check_token()
    names = name_all(run, outputs, base_id=options.base_id, ids=options.ids)
    names = names if options.dry_run else pin_bases(names)
    subject = _subject(options, kind, run, outputs, names)
    with tempfile.TemporaryDirectory(prefix="extend-publish-") as directory:
        folder = Folder(Path(directory), names)
        card = _fill(folder, subject, run, read=not options.dry_run)
        privacy = Privacy(names.local, options.allow, [options.to, *map(str, names.ids.values())])
        privacy.require(folder.listing())
        uploaded = None if options.dry_run else destination.send(folder)
        files = [(f.name, f.bytes, f.origin) for f in sorted(folder.files, key=_by_name)]
    return Publication(options.to, kind, files, card, options.public, uploaded,
                       options.tag), outputs


def _by_name(file: SentFile) -> str:
    return file.name


def _subject(options: PublishOptions, kind: str, run: Run, outputs: list[StageOutput],
             names: Names) -> Subject:
    lineage = list({before.directory: before for output in outputs
                    for before in run.ancestors(output)}.values())
    base, path = _base_of(outputs, lineage, names)
    terms = settle_terms(options.model_dump(), base, path, online=not options.dry_run)
    return Subject(run, options.to, kind, outputs, lineage, _results(options, kind, run, outputs),
                   names, terms, options.tag)


def _base_of(outputs: Sequence[StageOutput], lineage: Sequence[StageOutput],
             names: Names) -> tuple[HubId | None, str | None]:
    """The model whose licence holds, and its path: the target of a merge, or the base."""
    entries = [(role, str(entry["path"])) for output in [*reversed(outputs), *lineage]
               for role, entry in output.manifest["inputs"].items()]
    known = [path for role, path in entries if role == "target" and path in names.ids]
    known += [path for _, path in entries if path in names.ids]
    return (names.ids[known[0]], known[0]) if known else (None, None)


def _results(options: PublishOptions, kind: str, run: Run,
             outputs: Sequence[StageOutput]) -> list[Results]:
    if options.results is not None:
        return read_results(options.results) if options.results else []
    found = outputs if kind == RESULTS else run.results
    return read_results({output.name: output.directory for output in found}) if found else []


def _fill(folder: Folder, subject: Subject, run: Run, *, read: bool) -> str:
    """Everything that is sent; returns the card."""
    if subject.kind != RESULTS:
        add_output(folder, subject.output, subject.names, read=read)
    evaluated = {str(result.path.parent.absolute()) for result in subject.results}
    seen = [*subject.lineage, *(before for output in run.results
                                if str(output.directory) in evaluated
                                for before in run.ancestors(output))]
    others = {output.directory: output for output in seen
              if output is not subject.output or subject.kind == RESULTS}
    add_provenance(folder, run, others.values(), subject.names)
    add_results(folder, subject.results)
    return write_card(folder, subject)


def _record(out: Path, options: PublishOptions, publication: Publication,
            outputs: Sequence[StageOutput], overwrite: bool) -> None:
    inputs: Mapping[str, Path | str] = {"source": options.source, **{
        f"results.{label}": path for label, path in (options.results or {}).items()}}
    manifest = Manifest("publish", inputs, options.model_dump(
        mode="json", exclude={"source", "results"}))
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as partial:
        (partial / CARD).write_text(publication.card, encoding="utf-8")
        record = publication.to_json()
        write_json(partial / RECORD, {key: value for key, value in record.items()
                                      if key != "card"})
        manifest.write(partial, repo=publication.repo, commit=record["commit"],
                       dry_run=record["dry_run"], published=[o.name for o in outputs])



