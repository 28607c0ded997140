"""`extend publish`: an adapter, a model or results on the Hugging Face Hub."""

import click

from extend.cli.group import main, reporting
from extend.cli.types import ListType, parse_labels


@main.command()
@click.argument("source", metavar="DIR")
@click.option("--to", required=True, metavar="ORG/NAME", help="Repository; made if it is missing.")
@click.option("--kind", type=click.Choice(["adapter", "model", "results"]), default=None,
              help="What of a run to publish; its adapter unless given.")
@click.option("--public", is_flag=True, help="Let everybody see it; private without.")
@click.option("--dry-run", is_flag=True,
              help="Show the files and the whole card; send nothing. Needs no network.")
@click.option("--base-id", default=None, metavar="ORG/NAME[@COMMIT]",
              help="The base model on the Hub, where a local path was given for it.")
@click.option("--id", "ids", multiple=True, metavar="PATH=ORG/NAME[@COMMIT]",
              help="Another model on the Hub, such as the target of a merge; PATH may be the end "
                   "of its path.")
@click.option("--results", multiple=True, metavar="LABEL=DIR",
              help="Evaluations to publish with it; all of the run's unless given.")
@click.option("--no-results", is_flag=True, help="Publish it without evaluations.")
@click.option("--tag", default=None, help="Name for the commit, such as v1.")
@click.option("--message", default=None, help="Message of the commit.")
@click.option("--license", "license_", default=None,
              help="Such as apache-2.0; the base's unless given.")
@click.option("--license-name", default=None, help="With --license other.")
@click.option("--license-link", default=None, help="With --license other.")
@click.option("--language", type=ListType(), default=None,
              help="Codes separated by commas, such as en,de; the base's unless given.")
@click.option("--replace", is_flag=True,
              help="Replace what else the repository holds; its history keeps it.")
@click.option("--allow", multiple=True, metavar="TEXT",
              help="Send this text although it looks private, such as a path in an example.")
@reporting
def publish(source, ids, results, no_results, license_, **options):
    """Publish an adapter, a model or results on the Hugging Face Hub, with a card.

    DIR is the output of a stage, or the directory of a run. The card is made from manifests and
    results alone; local paths become repositories and names of stages, and what else looks private
    is refused. What is there already is not sent again, and every file's hash is compared in the
    end. The token is that of `hf auth login`, or HF_TOKEN.

    \b
    extend publish runs/final --to me/llama-128k-lora --base-id org/llama --dry-run
    extend publish runs/final/adapter --to me/llama-128k-lora --base-id org/llama --tag v1
    extend publish runs/final/merged --to me/llama-128k --base-id org/llama --public
    extend publish runs/final --kind results --to me/llama-128k-results --license apache-2.0
    """
    from extend.errors import RecipeError
    from extend.publish import publish as stage

    if results and no_results:
        raise RecipeError(f"publish: --results {results[0]} and --no-results exclude each other")
    labelled = parse_labels(results, "publish") if results or no_results else None
    publication = stage(source, ids=_pairs(ids), results=labelled, license=license_, **options)
    return publication.to_json(), publication.to_text()


def _pairs(ids: tuple[str, ...]) -> dict[str, str]:
    from extend.errors import RecipeError

    found = dict(item.rpartition("=")[::2] for item in ids)
    if len(found) != len(ids) or not all(key and value for key, value in found.items()):
        raise RecipeError(f"publish: write each --id once as PATH=ORG/NAME; given {' '.join(ids)}")
    return found
