"""The options of `publish`, as a recipe writes them. Imports no torch."""

from typing import Literal

from extend.option_types import InputPath, Options

PublishKind = Literal["adapter", "model", "results"]


class PublishOptions(Options):
    """publish: an adapter, a model or results as a repository of the Hugging Face Hub."""

    source: InputPath
    """Output of a stage, or the directory of a run."""
    to: str
    """ORG/NAME; results become a repository of data sets."""
    kind: PublishKind | None = None
    """What of a run to publish: its last adapter, else its last model, unless given."""
    results: dict[str, InputPath] | None = None
    """Label -> results.json, its directory, or the name of an eval stage; all of the run's unless
    given."""
    public: bool = False
    tag: str | None = None
    """Name for the commit, such as v1."""
    message: str | None = None
    """Of the commit."""
    base_id: str | None = None
    """ORG/NAME or ORG/NAME@COMMIT of the base model, where a local path was given for it."""
    ids: dict[str, str] = {}
    """Path of another model, or the end of it -> ORG/NAME or ORG/NAME@COMMIT."""
    license: str | None = None
    """The base's unless given; `other` needs license_name and license_link."""
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] | None = None
    """Codes such as en; the base's unless given."""
    replace: bool = False
    """Replace what else the repository holds; its history keeps it."""
    allow: list[str] = []
    """Texts that may be sent although they look private, such as a path in an example."""
    dry_run: bool = False
    """Show the files and the card; needs no network."""
