"""The `extend` command, and what every subcommand has: errors, streams, exit codes, --out."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from extend.errors import ExtendError
from extend.rope.factors import FOR_OTHER_ENGINES

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

Results = dict[str, Any] | tuple[dict[str, Any], str]
"""What a subcommand returns: the object that --json prints, and what is printed without it, which
is the object's `output` (the path of what was written) unless given."""


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


def reporting(function: Callable[..., Results]) -> Callable[..., None]:
    """Add --json, --debug and --quiet, and turn the returned results into output."""
    @wraps(function)
    def command(json_: bool, debug: bool, quiet: bool, **arguments: Any) -> None:
        _configure_logging(quiet)
        try:
            returned = function(**arguments)
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
        results, text = returned if isinstance(returned, tuple) else (returned, None)
        click.echo(json.dumps(results) if json_ else text or results["output"])

    for option in (
            click.option("--json", "json_", is_flag=True, help="Print one JSON object on stdout."),
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")):
        command = option(command)
    return command


def _is_news(record: logging.LogRecord) -> bool:
    """Not that transformers leaves keys unread that are written for vLLM and SGLang."""
    message = record.getMessage()
    if not message.startswith("Unrecognized keys in `rope_parameters`"):
        return True
    return not set(re.findall(r"'(\w+)'", message.rpartition(":")[2])) <= FOR_OTHER_ENGINES


def _configure_logging(quiet: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    level = logging.WARNING if quiet or rank != 0 else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of transformers, too
    logging.getLogger("transformers.modeling_rope_utils").addFilter(_is_news)
    for noisy in ("transformers", "torch", "torch.distributed", "matplotlib", "PIL", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


out_option = click.option("--out", required=True, metavar="DIR", help="Directory to write.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace DIR if it exists.")
