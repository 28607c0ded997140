"""Commands of shell blocks: read as a shell would cut them, `extend` as click would parse it."""

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import click

from extend.cli import main
from tests.docs.pages import ROOT

_OPERATORS = {"&&", "||", "|", ";", "&"}
_REDIRECTION = re.compile(r"[<>]")
_ELIDED = "..."
OTHERS = {"git", "cd", ".", "hf", "vllm", "llama-server", "transformers", "sbatch", "head", "tail",
          "export"}
"""Programs of other projects that may begin a line; whatever follows is not looked at."""


def command_lines(text: str) -> Iterator[str]:
    """Lines without comments, those that end with a backslash joined to the next."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip().removeprefix("$ ")


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without variables before it and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _OPERATORS:
            words.append(word)
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        cut = next((i for i, w in enumerate(words) if _REDIRECTION.match(w)), len(words))
        if cut < len(words) and words[cut - 1] in ("1", "2"):
            cut -= 1  # 2>&1
        if words[0:1] == ["git"]:
            cut = len(words)  # <this repository>
        if words[:cut]:
            yield words[:cut]
        words = []


def problem(words: Sequence[str]) -> str | None:
    """What is wrong with a command, if anything."""
    program, *rest = words
    if program == "extend":
        return extend_problem(rest)
    if program in ("torchrun", "accelerate"):
        return _launched_problem(rest)
    if program in ("python", "python3", ".venv/bin/python", "sudo"):
        return _python_problem(rest)
    if program == "eval":  # "$(extend completion bash)"
        inner = [found for word in rest for found in re.findall(r"\$\((.*?)\)", word)]
        return next(filter(None, (problem(part.split()) for part in inner)), None)
    if program == "pip":
        return _pip_problem(rest)
    if program.startswith("scripts/"):
        return _script_problem(program, rest)
    return None if program in OTHERS else f"{program}: not a program that pages may call"


def extend_problem(words: Sequence[str]) -> str | None:
    """What click says to `extend *words`; nothing is run, and no file is opened."""
    if not words or words[0].startswith("-"):
        return _parse_problem(main, list(words), strict=False)
    command: click.Command = main
    words = list(words)
    while isinstance(command, click.Group) and words:
        name = words.pop(0)
        inner = command.commands.get(name)
        if inner is None:
            return f"extend {name}: no such command"
        command = inner
    strict = _ELIDED not in words
    return _parse_problem(command, [word for word in words if word != _ELIDED], strict=strict)


def _parse_problem(command: click.Command, words: list[str], *, strict: bool) -> str | None:
    try:
        if strict:
            with contextlib.redirect_stdout(io.StringIO()):
                command.make_context(str(command.name), words)
        else:
            command.make_parser(click.Context(command)).parse_args(words)
    except click.exceptions.Exit as ended:
        return None if ended.exit_code == 0 else f"exit code {ended.exit_code}"
    except click.ClickException as error:
        return error.format_message()
    return None


def options_exist(words: Sequence[str]) -> str | None:
    """Like `extend_problem`, for code in running text: metavariables may stand for values."""
    if not words or words[0].isupper() or words[0] == _ELIDED:
        return None
    if words[0].startswith("-"):
        return extend_problem(words)
    return extend_problem([*words, _ELIDED])


def _launched_problem(words: Sequence[str]) -> str | None:
    for before, program in pairwise(words):
        if program == "extend" and before in ("-m", "--module"):
            return extend_problem(words[words.index("extend") + 1:])
    script = next((word for word in words if word.endswith(".py")), None)
    return _python_problem(words[words.index(script):]) if script else \
        f"{' '.join(words)}: launches neither -m extend nor a script"


def _python_problem(words: Sequence[str]) -> str | None:
    if list(words[:2]) == ["-m", "extend"]:
        return extend_problem(words[2:])
    if words[0].endswith("python"):
        words = words[1:]
    if words[0] == "-m" and words[1].startswith("scripts."):
        return _script_problem(words[1].replace(".", "/") + ".py", words[2:])
    return _script_problem(words[0], words[1:]) if words[0].startswith("scripts/") else None


def _script_problem(script: str, words: Sequence[str]) -> str | None:
    """The script is there, and options it is given are written in it or in its package."""
    if not (ROOT / script).is_file():
        return f"{script}: no such script"
    for word in words:
        option = word.split("=")[0]
        if option.startswith("--") and f'"{option}"' not in _scripts() \
                and option not in (ROOT / script).read_text(encoding="utf-8"):
            return f"{script}: knows no option {option}"
    return None


@cache
def _scripts() -> str:
    return "\n".join(path.read_text(encoding="utf-8")
                     for path in sorted((ROOT / "scripts").rglob("*.py")))


def _pip_problem(words: Sequence[str]) -> str | None:
    own = re.findall(r"(?:extend-context|\.)\[([\w,-]+)\]", " ".join(words))
    return extras_problem(own)


def extras_problem(names: Sequence[str]) -> str | None:
    """Extras that pyproject.toml does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in ",".join(names).split(","):
        if extra and extra not in project["optional-dependencies"]:
            return f"extend-context[{extra}]: no such extra"
    return None
