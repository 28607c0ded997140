"""`extend eval-prompt`: one prompt of an evaluation, built again."""

import json
import logging

import click

from extend.cli.group import Exact, main, reporting

logger = logging.getLogger(__name__)


@main.command("eval-prompt")
@click.argument("results")
@click.option("--row", type=int, required=True, metavar="N", help="Row of the results, from 0.")
@click.option("--trial", type=int, default=0, show_default=True, metavar="K",
              help="Prompt of the row, from 0.")
@click.option("--model", default=None, metavar="DIR",
              help="Where the tokenizer is now; without it, where the scored model was.")
@click.option("--input", "inputs", multiple=True, metavar="TASK.OPTION=PATH",
              help="Where a file that a task read is now; may be repeated.")
@click.option("--ids", is_flag=True, help="Print token ids instead of text.")
@reporting
def eval_prompt(results, row, trial, model, inputs, ids):
    """Build a prompt of RESULTS (results.json or its directory) again, byte for byte.

    Its ids are checked against the hash that the results hold. When they differ, the error says
    which file is another one.

    \b
    extend eval-prompt ./results --row 12
    extend eval-prompt ./results --row 12 --trial 3 --ids
    extend eval-prompt ./results --row 40 --model ./llama --input passkey-text.haystack=./books
    """
    from extend.cli.types import parse_labels
    from extend.evaluate.rebuild import rebuild_prompt

    rebuilt = rebuild_prompt(results, row, trial, model=model,
                             inputs=parse_labels(inputs, "--input"))
    for change in rebuilt.changed:
        logger.warning("note: %s; this prompt is the same all the same", change)
    return rebuilt.to_json(), Exact(json.dumps(rebuilt.ids) if ids else rebuilt.text)
