"""About the tool itself: `env` for bug reports, `completion` for shells."""

from typing import Any

import click

from extend.cli.group import main, reporting
from extend.cli.types import Choice


@main.command()
@reporting
def env():
    """Print what a bug report needs: versions, GPUs, their links, paths. Nothing secret.

    \b
    extend env
    extend env --json > env.json
    """
    from extend.environment import describe_environment

    found = describe_environment()
    return found, "\n".join(_lines(found))


def _lines(value: Any, indent: str = "") -> list[str]:
    lines = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list) and item:
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_told(key, item)}")
    return lines


def _told(key: str | int, item: Any) -> str:
    if str(key).endswith("_bytes"):
        return f"{item / 2**30:.1f} GiB"
    return "none" if item in (None, [], {}) else str(item)


@main.command()
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]))
@reporting
def completion(shell):
    """Print what makes a shell complete commands, options, choices and recipes.

    \b
    eval "$(extend completion bash)"                 # in ~/.bashrc
    eval "$(extend completion zsh)"                  # in ~/.zshrc, after compinit
    extend completion fish > ~/.config/fish/completions/extend.fish
    """
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)(main, {}, "extend", "_EXTEND_COMPLETE")
    script = complete.source().strip("\n")
    return {"shell": shell, "script": script}, script
