"""The stages that learn how to merge, or what a merge lost, from prompts without answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from extend.cli.group import main, out_option, overwrite_option, reporting
from extend.cli.types import LENGTH, Choice, ListType

_LESSON = (
    click.option("--prompts", metavar="FILE", default=None,
                 help="JSON lines with `prompt`, or text with one a line; answers are not read."),
    click.option("--max-prompts", type=int, default=64, show_default=True,
                 help="Drawn from those; half of them to judge by."),
    click.option("--sample", type=int, default=0, show_default=True,
                 help="Short texts that the target writes itself, as prompts; those of its own "
                      "work serve far better."),
    click.option("--max-new", type=int, default=64, show_default=True,
                 help="Most tokens of an answer."),
    click.option("--text", metavar="PATH", default=None,
                 help="Text to hide facts in; repeated filler by default."),
    click.option("--length", type=LENGTH, default=None,
                 help="Tokens of a long row; the long context, at most 32k, by default."),
    click.option("--rows", type=int, default=8, show_default=True,
                 help="Long rows, half of them to judge by."),
    click.option("--facts", type=ListType(click.INT), default="1,8", show_default=True,
                 help="Facts in a long row; each draws one of these."),
    click.option("--keep", type=float, default=0.5, show_default=True,
                 help="Weight of the target's answers against the long context, 0 to 1."),
    click.option("--device", default="auto", show_default=True),
    click.option("--seed", type=int, default=0, show_default=True),
)


def lesson_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what `fit` and `repair` both learn from."""
    for option in reversed(_LESSON):
        command = option(command)
    return command


def _checked(name: str, values: dict[str, Any]) -> Any:
    """The option model of a stage, with its complaints as one error."""
    from pydantic import ValidationError

    from extend.errors import RecipeError
    from extend.options import STAGES

    try:
        return STAGES[name](**values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or name}: "
                 f"{item['msg'].removeprefix('Value error, ')}" for item in error.errors()]
        raise RecipeError("; ".join(lines)) from None


def _results(directory: Path, name: str) -> dict[str, Any]:
    from extend.model_config import read_json

    return {"output": str(directory), "scores": read_json(directory / name)["scores"]}


@main.command()
@click.option("--target", required=True, metavar="DIR", help="A fine-tune of the same base.")
@click.option("--adapter", metavar="DIR", default=None, help="An adapter of `extend extract`.")
@click.option("--tuned", metavar="DIR", default=None, help="Long model, in place of an adapter.")
@click.option("--base", metavar="DIR", default=None,
              help="What the long model, or an adapter with whole values, was made from.")
@click.option("--rope-from", metavar="DIR", default=None,
              help="Long model to take the RoPE from, for an adapter without a sidecar.")
@click.option("--groups", type=Choice(["kind", "layer", "module"]), default="kind",
              show_default=True, help="What shares a weight; kind: attention, MLP, norms.")
@click.option("--steps", type=int, default=40, show_default=True,
              help="Most steps from each of the two starts.")
@click.option("--lr", type=float, default=0.05, show_default=True)
@lesson_options
@out_option
@overwrite_option
@reporting
def fit(out, overwrite, **options):
    """Fit the weights of a merge from prompts without answers.

    Each layer's attention, MLP and norms get a weight of their own, such that the target answers
    as before and the long context is used. Half of the prompts only judge.

    \b
    extend fit --adapter ./adapter --target ./my-finetune --prompts asked.jsonl --out ./weights
    extend merge --adapter ./adapter --target ./my-finetune \\
        --layer-weights ./weights/weights.json --out ./my-finetune-128k
    """
    from extend.transfer import fit as stage

    return _results(stage(_checked("fit", options), out, overwrite=overwrite), "fit.json")


@main.command()
@click.argument("merged")
@click.option("--reference", required=True, metavar="DIR", help="The target before the merge.")
@click.option("--steps", type=int, default=100, show_default=True)
@click.option("--lr", type=float, default=None, help="2e-5, or 2e-4 with a rank, by default.")
@click.option("--rank", type=int, default=None,
              help="Train a LoRA of this rank; all weights of the layers by default.")
@lesson_options
@out_option
@overwrite_option
@reporting
def repair(out, overwrite, **options):
    """Train MERGED for a few steps to answer as its target did before the merge.

    No labels: the target's own answers are what is learnt, beside made-up facts in long rows. The
    best look at the held-out half is what is written.

    \b
    extend repair ./my-finetune-128k --reference ./my-finetune --prompts asked.jsonl --out ./mended
    """
    from extend.transfer import repair as stage

    return _results(stage(_checked("repair", options), out, overwrite=overwrite), "repair.json")
