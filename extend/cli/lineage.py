"""`extend lineage`: is this model a fine-tune of that one?"""

import click

from extend.cli.group import main, overwrite_option, reporting


@main.command()
@click.option("--target", required=True, metavar="DIR", help="The model in question.")
@click.option("--base", default=None, metavar="DIR",
              help="The model that it may come from. Without it, the sample that --adapter keeps "
                   "of its base is compared.")
@click.option("--tuned", default=None, metavar="DIR",
              help="The long model: measure its delta against target - base, too.")
@click.option("--adapter", default=None, metavar="DIR", help="The same with an adapter's delta.")
@click.option("--rank", type=int, default=16, show_default=True,
              help="Dimension of the leading subspaces that are compared.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", default=None, metavar="DIR",
              help="Write lineage.json and lineage.png there.")
@overwrite_option
@reporting
def lineage(target, base, tuned, adapter, rank, seed, out, overwrite):
    """Say how a model relates to its base, layer by layer, and whether a long delta suits it.

    Cosine, drift and equal elements, the conflict of two deltas, and a verdict in words with what
    it means for a merge.

    \b
    extend lineage --base ./llama --target ./my-finetune
    extend lineage --base ./llama --target ./my-finetune --tuned ./llama-128k --out ./lineage
    extend lineage --adapter ./adapter --target ./my-finetune
    """
    from extend.lineage import lineage as stage
    from extend.lineage import write_lineage

    found = stage(target, base, tuned=tuned, adapter=adapter, rank=rank, seed=seed)
    results, text = found.to_json(), found.to_text()
    if out:
        results["output"] = str(write_lineage(found, out, overwrite=overwrite))
        text += f"\n\n{results['output']}"
    return results, text
