"""What is done with an adapter alone: `cut` and `adapter-report`."""

import click

from extend.cli.group import main, out_option, overwrite_option, reporting
from extend.cli.types import DTYPE, parse_labels


@main.command()
@click.option("--adapter", required=True, metavar="DIR", help="An adapter, ours or PEFT's.")
@click.option("--rank", type=int, default=None, help="Rank of every module.")
@click.option("--energy", type=float, default=None,
              help="Keep this share of the squared norm of what each module holds.")
@click.option("--bytes", "adapter_bytes", type=int, default=None, metavar="N",
              help="Largest size of the adapter file, spent where it holds most.")
@click.option("--dtype", type=DTYPE, default=None,
              help="Dtype of the factors; the adapter's own by default.")
@out_option
@overwrite_option
@reporting
def cut(adapter, rank, energy, adapter_bytes, dtype, out, overwrite):
    """Make an adapter smaller, without the models that it came from.

    Each module becomes the nearest one of a smaller rank, as an extraction at that rank gives it.

    \b
    extend cut --adapter ./adapter --rank 16 --out ./adapter-r16
    """
    from extend.adapter import cut as stage

    path = stage(adapter, out, rank=rank, energy=energy, adapter_bytes=adapter_bytes, dtype=dtype,
                 overwrite=overwrite)
    return {"output": str(path)}


@main.command("adapter-report")
@click.argument("adapter")
@click.option("--results", multiple=True, metavar="LABEL=RESULTS",
              help="Results of `extend eval`: of a model with an adapter of any size, or of one "
                   "without to compare with. May be repeated.")
@click.option("--base", default=None, metavar="DIR",
              help="Measure on this checkpoint what a merge loses, for an adapter of PEFT's.")
@out_option
@overwrite_option
@reporting
def adapter_report(adapter, results, base, out, overwrite):
    """Write a page on ADAPTER: what it keeps, what smaller ones would, and what they scored.

    \b
    extend adapter-report ./adapter --results r8=runs/eval-r8 --results r64=runs/eval-r64 --out DIR
    """
    from extend.adapter import adapter_report as stage

    labelled = parse_labels(results, "adapter-report")
    return {"output": str(stage(adapter, out, results=labelled, base=base, overwrite=overwrite))}
