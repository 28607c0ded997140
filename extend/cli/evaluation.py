"""The stages that measure models: `eval` and `report`."""

import json
from pathlib import Path

import click

from extend.cli.group import main, out_option, overwrite_option, reporting
from extend.cli.types import LENGTH, ListType, parse_labels


@main.command("eval")
@click.argument("model")
@click.option("--tasks", type=ListType(), default="passkey", show_default=True,
              help="Names separated by commas: passkey, passkey-text, exact-match, loss.")
@click.option("--lengths", type=ListType(LENGTH), default="", help="Lengths: 4k,8k,128k.")
@click.option("--depths", type=int, default=10, show_default=True, help="Depths from 0 to 1.")
@click.option("--trials", type=int, default=5, show_default=True, help="Trials of each cell.")
@click.option("--haystack", metavar="PATH", help="Text to hide keys in (passkey-text).")
@click.option("--file", metavar="PATH", help="Prompts and answers, JSON lines (exact-match).")
@click.option("--text", metavar="PATH", help="Held-out text (loss).")
@click.option("--adapter", metavar="DIR", default=None, help="Adapter to add to MODEL first.")
@click.option("--nproc", type=int, default=1, show_default=True, help="Processes, one per GPU.")
@click.option("--seed", type=int, default=0, show_default=True)
@out_option
@overwrite_option
@reporting
def evaluate(model, tasks, lengths, depths, trials, haystack, file, text, adapter, nproc, seed, out,
             overwrite):
    """Score MODEL on a grid of lengths and depths; write results.json.

    \b
    extend eval ./llama-128k --tasks passkey --lengths 8k,32k,128k --out ./results
    extend eval ./llama-128k --tasks passkey-text --haystack ./books --lengths 32k --out ./real
    """
    from extend.evaluate import evaluate as stage
    from extend.evaluate.tasks import TASKS
    from extend.registry import lookup, option_names

    given = {"haystack": haystack, "file": file, "text": text}
    specs = []
    for name in tasks:
        accepted = option_names(lookup(TASKS, name, "--tasks"))
        specs.append({"task": name, **{k: v for k, v in given.items() if v and k in accepted}})
    path = stage(model, out, tasks=specs, lengths=lengths, depths=depths, trials=trials, seed=seed,
                 adapter=adapter, nproc=nproc, overwrite=overwrite)
    return {"output": str(path), **json.loads(Path(path).read_text())["summary"]}


@main.command()
@click.argument("results", nargs=-1, required=True, metavar="LABEL=RESULTS...")
@click.option("--title", default="", help="Title of the page.")
@out_option
@overwrite_option
@reporting
def report(results, title, out, overwrite):
    """Write an HTML page, heat maps and a table that compare the RESULTS of several models.

    \b
    extend report base=runs/eval-base long=runs/eval-long --out ./report
    """
    from extend.evaluate import report as stage

    labelled = parse_labels(results, "report")
    return {"output": str(stage(labelled, out, title=title, overwrite=overwrite))}
