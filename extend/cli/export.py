"""`export`: a step of a run that is not done, as a checkpoint."""

import click

from extend.cli.group import main, out_option, overwrite_option, reporting
from extend.cli.types import DTYPE


@main.command()
@click.argument("state")
@click.option("--model", default=None, metavar="DIR",
              help="The model that the run started from, if it is not where it was.")
@click.option("--dtype", type=DTYPE, default=None,
              help="Dtype of the output; that of the run's own output by default.")
@out_option
@overwrite_option
@reporting
def export(state, model, dtype, out, overwrite):
    """Write a saved step of a training run as a checkpoint; the run can still go on.

    STATE is the directory of a step beside the run's --out, or the one above it for the newest
    step. One process does it, without a GPU.

    \b
    extend export runs/long.state/step-200 --out ./long-200
    """
    from extend.train.export_step import export_step

    path = export_step(state, out, model=model, dtype=dtype, overwrite=overwrite)
    return {"output": str(path)}
