"""The `extend` command, and what every subcommand has: output, streams, --out, --set."""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click

from extend.cli.failing import tell, telling_errors
from extend.cli.types import PathType
from extend.console import printable, showing_logs

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

# In the order of the pipeline. A command that is not here stands at the end.
SECTIONS = {
    "Recipes": ("init", "validate", "run", "schema"),
    "Plan and check": ("plan", "search", "doctor", "import"),
    "Extend": ("rescale", "train", "export"),
    "Adapters": ("extract", "cut", "adapter-report"),
    "Merge": ("lineage", "merge", "fit", "repair"),
    "Evaluate": ("eval", "eval-prompt", "report"),
    "Publish": ("run-page", "publish"),
    "This tool": ("env", "completion"),
}
_EXAMPLES = re.compile(r"\n\n\x08\n([^\n]*\bextend .*)\Z", re.DOTALL)
_PATHS = re.compile(r"(DIR|FILE|PATH)\d?(\|\w+)?")

Results = dict[str, Any] | tuple[dict[str, Any], str] | tuple[dict[str, Any], str, str | None]
"""What a subcommand returns: the object that --json prints; what is printed without it, which is
the object's `output` (the path of what was written) unless given; and a complaint, for what was
examined and is not good, with which the command exits with 1."""


class Exact(str):
    """Text that goes byte for byte into a file or pipe: a path, or a prompt."""



class _Command(click.Command):
    """Shows the last block of its help, if it holds commands, at the end; completes paths."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        for param in self.params:
            told = getattr(param, "metavar", None) or ""
            if param.type is click.STRING and (isinstance(param, click.Argument)
                                               or _PATHS.fullmatch(told)):
                param.type = PathType()

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(_EXAMPLES.sub("", cleandoc(self.help or "")))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = _EXAMPLES.search(cleandoc(self.help or ""))
        if found:
            with formatter.section("Examples"):
                formatter.write_text(f"\b\n{found[1]}")


class _Group(_Command, click.Group):
    """Lists its commands by section, suggests the one that was meant, and tells every error."""

    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        known = [name for names in SECTIONS.values() for name in names if name in self.commands]
        return known + sorted(self.commands.keys() - set(known))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        sections = {title: [n for n in names if n in members]
                    for title, members in SECTIONS.items()}
        sections["Others"] = [n for n in names if not any(n in m for m in SECTIONS.values())]
        width = max(map(len, names))
        for title, members in sections.items():
            if members:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width), _first_sentence(self.commands[name]))
                                        for name in members])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from extend.registry import suggest

            names = self.list_commands(ctx)
            ctx.fail(f"no command {args[0]!r};{suggest(args[0], names)} "
                     f"choose one of {', '.join(names)}")
        return super().resolve_command(ctx, args)

    def main(self, args: list[str] | None = None, standalone_mode: bool = True,
             **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        args = sys.argv[1:] if args is None else list(args)
        with telling_errors(as_json="--json" in args, debug="--debug" in args):
            sys.exit(super().main(args, standalone_mode=False, obj="--json" in args, **extra))


def _first_sentence(command: click.Command) -> str:
    return " ".join((command.help or "").split("\n\n")[0].split()).removesuffix(".")


def _everywhere(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that may stand before and after the subcommand."""
    for option in (
            click.option("--json", "json_", is_flag=True,
                         help="Print one JSON object on stdout, also of an error."),
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            click.option("-v", "--verbose", is_flag=True, help="All progress, a line each."),
            click.option("-q", "--quiet", is_flag=True, help="Warnings only on stderr.")):
        command = option(command)
    return command


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(package_name="extend-context", prog_name="extend")
@_everywhere
def main(**_: Any) -> None:
    """Give a language model a long context, and hand it on to its siblings.

    \b
    rescale -> train -> extract -> merge -> eval: each reads and writes directories,
    and `extend run recipe.yaml` does them all.

    \b
    extend init demo --out demo.yaml
    extend validate demo.yaml
    extend run demo.yaml --out runs/demo
    """


def reporting(function: Callable[..., Results]) -> Callable[..., None]:
    """Add --json, --debug, --verbose and --quiet, and turn the returned results into output."""
    @_everywhere
    @wraps(function)
    def command(**arguments: Any) -> None:
        before = click.get_current_context().find_root().params
        flags = {name: arguments.pop(name) or before.get(name, False)
                 for name in ("json_", "debug", "verbose", "quiet")}
        # What libraries print is no result.
        with _logging(flags["verbose"], flags["quiet"]), redirect_stdout(sys.stderr):
            returned = function(**arguments)
        if _rank() != 0:
            return  # another process of the same launch prints the result
        results, text, complaint = (*(returned if isinstance(returned, tuple) else (returned,)),
                                    None, None)[:3]
        say(results, text, as_json=flags["json_"])
        if complaint:
            tell(complaint)
            sys.exit(1)

    return command


def say(results: dict[str, Any], text: str | None = None, *, as_json: bool) -> None:
    """Print a result as JSON, or as text that is harmless on a terminal."""
    text = to_json(results) if as_json else text or Exact(results["output"])
    is_exact = isinstance(text, Exact) and not sys.stdout.isatty()
    click.echo(text.encode("utf-8", "surrogateescape") if is_exact else printable(text))


def to_json(results: dict[str, Any]) -> str:
    """One line of JSON, ASCII only. Numbers that are not finite, which JSON lacks, become null."""
    try:
        return json.dumps(results, allow_nan=False, default=os.fspath)
    except ValueError:
        return json.dumps(_finite(results), default=os.fspath)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _is_news(record: logging.LogRecord) -> bool:
    """Not that transformers leaves keys unread that are written for vLLM and SGLang."""
    message = record.getMessage()
    if not message.startswith("Unrecognized keys in `rope_parameters`"):
        return True
    from extend.rope.factors import FOR_OTHER_ENGINES

    return not set(re.findall(r"'(\w+)'", message.rpartition(":")[2])) <= FOR_OTHER_ENGINES


@contextmanager
def _logging(verbose: bool, quiet: bool) -> Iterator[None]:
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of transformers, too
    chatty = logging.getLogger("transformers.modeling_rope_utils")
    chatty.addFilter(_is_news)
    try:
        with showing_logs(level, rank=_rank()):
            yield
    finally:
        chatty.removeFilter(_is_news)


out_option = click.option("--out", required=True, metavar="DIR", help="Directory to write.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace DIR if it exists.")
recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a value of the recipe: long.schedule.0.lr=1e-5 (a stage's name, its keys, places "
         "of lists from 0 on), or seed=1. The value is read as YAML. May be repeated.")
