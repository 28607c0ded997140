"""The command line: arguments to options, then one call.

Result paths go to stdout, progress to stderr; `--json` prints one JSON object on stdout instead.
Exit codes: 0 done, 1 a mistake of the user's (one message), 2 wrong usage.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from extend.errors import ExtendError


class _LengthType(click.ParamType):
    name = "length"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from extend.options import parse_length

        try:
            return parse_length(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _ListType(click.ParamType):
    """Values separated by commas."""

    def __init__(self, item: click.ParamType | None = None):
        self.item, self.name = item, "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        return [self.item.convert(p, param, ctx) if self.item else p for p in parts]


LENGTH = _LengthType()
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """Suggests the command that was probably meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from extend.registry import suggest

            names = self.list_commands(ctx)
            ctx.fail(f"no command {args[0]!r};{suggest(args[0], names)} "
                     f"choose one of {', '.join(names)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(package_name="extend-context", prog_name="extend")
def main() -> None:
    """Give a language model a long context, and hand it on to its siblings.

    \b
    rescale -> train -> extract -> merge -> eval: each reads and writes directories,
    and `extend run recipe.yaml` does them all.
    """


def _command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Add --json, --debug and --quiet, and turn the returned results into output."""
    @wraps(function)
    def command(json_: bool, debug: bool, quiet: bool, **arguments: Any) -> None:
        _configure_logging(quiet)
        try:
            results = function(**arguments)
        except ExtendError as error:
            if debug:
                raise
            click.echo(f"extend: {error}", err=True)
            if json_:
                click.echo(json.dumps({"error": str(error)}))
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("extend: interrupted; the same command goes on where it can", err=True)
            sys.exit(130)
        if int(os.environ.get("RANK", "0")) != 0:
            return  # another process of the same launch prints the result
        click.echo(json.dumps(results) if json_ else results["output"])

    for option in (
            click.option("--json", "json_", is_flag=True, help="Print one JSON object on stdout."),
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")):
        command = option(command)
    return command


def _configure_logging(quiet: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    level = logging.WARNING if quiet or rank != 0 else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of transformers, too
    for noisy in ("transformers", "torch", "torch.distributed", "matplotlib", "PIL", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` pairs as a dict; values that read as numbers or booleans become them."""
    import yaml

    from extend.errors import RecipeError
    from extend.options import parse_number

    reserved = ("model", "out", "target_len", "method", "sliding_window", "overwrite")
    found = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise RecipeError(f"--option {pair!r}: write it as key=value")
        if key in reserved:
            raise RecipeError(f"--option {pair!r}: {key} is no option of a RoPE method")
        found[key] = parse_number(yaml.safe_load(value))
    return found


_out = click.option("--out", required=True, metavar="DIR", help="Directory to write.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace DIR if it exists.")


@main.command(context_settings=_CONTEXT)
@click.argument("model")
@click.option("--to", required=True, type=LENGTH, help="Target length in tokens: 131072 or 128k.")
@click.option("--method", default="critical", show_default=True,
              help="RoPE method: theta, linear, ntk, critical, ntk-by-parts, yarn, ...")
@click.option("-o", "--option", multiple=True, metavar="KEY=VALUE", help="Option of the method.")
@click.option("--sliding-window", type=click.Choice(["refuse", "drop", "keep"]), default="refuse",
              show_default=True, help="What to do with a window shorter than the target.")
@_out
@_overwrite
@_command
def rescale(model, to, method, option, sliding_window, out, overwrite):
    """Write MODEL with a RoPE made for a longer context; the weights stay the same.

    \b
    extend rescale ./llama --to 128k --method ntk-by-parts --out ./llama-128k-init
    extend rescale ./llama --to 64k --method theta -o rope_theta=8e6 --out ./llama-64k-init
    """
    from extend.rope import rescale as stage

    path = stage(model, out, target_len=to, method=method, sliding_window=sliding_window,
                 overwrite=overwrite, **_options(option))
    return {"output": str(path)}


@main.command(context_settings=_CONTEXT)
@click.argument("recipe")
@click.option("--stage", default=None, help="Name of the train stage, if the recipe has several.")
@click.option("--nproc", type=int, default=None, help="Processes to start; one per GPU by default.")
@_out
@_overwrite
@_command
def train(recipe, stage, nproc, out, overwrite):
    """Run the train stage of RECIPE.

    \b
    extend train recipes/my.yaml --out runs/long --nproc 2
    torchrun --nproc_per_node 2 -m extend train recipes/my.yaml --out runs/long
    """
    from extend.errors import RecipeError
    from extend.options import resolve_inputs
    from extend.recipe import load_recipe
    from extend.train import train as run_stage

    loaded = load_recipe(recipe)
    found = [s for s in loaded.stages if s.kind == "train" and stage in (None, s.name)]
    if len(found) != 1:
        names = ", ".join(s.name for s in loaded.stages if s.kind == "train") or "none"
        raise RecipeError(f"{recipe}: {len(found)} train stages fit, one is needed; it has "
                          f"{names}; choose with --stage")
    names = {s.name for s in loaded.stages}

    def resolve(value: str) -> str:
        if value in names:
            raise RecipeError(f"{recipe}: {found[0].name} needs the output of stage {value!r}; "
                              "use `extend run`, or give a path")
        return str((loaded.path.parent / value).resolve())

    options = resolve_inputs(found[0].options, resolve)
    return {"output": str(run_stage(options, Path(out), nproc=nproc, overwrite=overwrite))}


@main.command(context_settings=_CONTEXT)
@click.option("--base", required=True, metavar="DIR", help="The model before.")
@click.option("--tuned", required=True, metavar="DIR", help="The model after.")
@click.option("--rank", type=int, default=None, help="Rank of every matrix (32 by default).")
@click.option("--energy", type=float, default=None, help="Keep this share of each squared norm.")
@click.option("--no-embeddings", is_flag=True, help="Leave embedding deltas out of the sidecar.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              default="float32",
              show_default=True, help="Dtype of the factors.")
@click.option("--seed", type=int, default=0, show_default=True)
@_out
@_overwrite
@_command
def extract(base, tuned, rank, energy, no_embeddings, dtype, seed, out, overwrite):
    """Write tuned - base as a PEFT LoRA adapter and a sidecar for what a LoRA cannot carry.

    \b
    extend extract --base ./llama --tuned ./llama-128k --rank 32 --out ./adapter
    """
    from extend.adapter import extract as stage

    path = stage(base, tuned, out, rank=rank, energy=energy, embeddings=not no_embeddings,
                 dtype=dtype, seed=seed, overwrite=overwrite)
    return {"output": str(path)}


@main.command(context_settings=_CONTEXT)
@click.option("--adapter", required=True, metavar="DIR", help="An adapter of `extend extract`.")
@click.option("--target", required=True, metavar="DIR", help="A fine-tune of the same base.")
@click.option("--weight", type=float, default=1.0, show_default=True, help="Factor of the delta.")
@click.option("--no-sidecar", is_flag=True, help="Apply the LoRA matrices and the RoPE only.")
@click.option("--rope-from", metavar="DIR", default=None,
              help="Long model to take the RoPE from, for an adapter without a sidecar.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default=None,
              help="Dtype of the output; the target's by default.")
@_out
@_overwrite
@_command
def merge(adapter, target, weight, no_sidecar, rope_from, dtype, out, overwrite):
    """Add an adapter to a fine-tune of the same base; write a long-context checkpoint.

    \b
    extend merge --adapter ./adapter --target ./my-finetune --out ./my-finetune-128k
    """
    from extend.merge import merge as stage

    path = stage(adapter, target, out, weight=weight, sidecar=not no_sidecar, rope_from=rope_from,
                 dtype=dtype, overwrite=overwrite)
    return {"output": str(path)}


@main.command("eval", context_settings=_CONTEXT)
@click.argument("model")
@click.option("--tasks", type=_ListType(), default="passkey", show_default=True,
              help="Names separated by commas: passkey, passkey-text, exact-match, loss.")
@click.option("--lengths", type=_ListType(LENGTH), default="", help="Lengths: 4k,8k,128k.")
@click.option("--depths", type=int, default=10, show_default=True, help="Depths from 0 to 1.")
@click.option("--trials", type=int, default=5, show_default=True, help="Trials of each cell.")
@click.option("--haystack", metavar="PATH", help="Text to hide keys in (passkey-text).")
@click.option("--file", metavar="PATH", help="Prompts and answers, JSON lines (exact-match).")
@click.option("--text", metavar="PATH", help="Held-out text (loss).")
@click.option("--adapter", metavar="DIR", default=None, help="Adapter to add to MODEL first.")
@click.option("--nproc", type=int, default=1, show_default=True, help="Processes, one per GPU.")
@click.option("--seed", type=int, default=0, show_default=True)
@_out
@_overwrite
@_command
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


@main.command(context_settings=_CONTEXT)
@click.argument("results", nargs=-1, required=True, metavar="LABEL=RESULTS...")
@click.option("--title", default="", help="Title of the page.")
@_out
@_overwrite
@_command
def report(results, title, out, overwrite):
    """Write an HTML page, heat maps and a table that compare the RESULTS of several models.

    \b
    extend report base=runs/eval-base long=runs/eval-long --out ./report
    """
    from extend.errors import RecipeError
    from extend.evaluate import report as stage

    labelled = dict(item.partition("=")[::2] for item in results)
    if len(labelled) != len(results) or not all(labelled.values()):
        raise RecipeError("report: write each result once as LABEL=PATH; given "
                          + " ".join(results))
    return {"output": str(stage(labelled, out, title=title, overwrite=overwrite))}


@main.command(context_settings=_CONTEXT)
@click.argument("recipe")
@_out
@_command
def run(recipe, out):
    """Run every stage of RECIPE in order; what is done is skipped, what was interrupted resumes.

    \b
    extend run recipes/demo.yaml --out runs/demo
    """
    from extend.run import run as run_recipe

    return {"output": str(run_recipe(recipe, out))}
