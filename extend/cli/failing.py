"""How a command fails: one message on stderr, an exit code, and with --json an object on stdout.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted (SIGINT),
143 terminated (SIGTERM).
"""

import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from extend.console import printable
from extend.errors import ExtendError
from extend.secrets import hide_secrets


class Terminated(KeyboardInterrupt):
    """SIGTERM: what is interrupted ends as it does by SIGINT."""


@contextmanager
def _raising_terminated() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`; only the main thread may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends what the first could not
        raise Terminated

    old = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def telling_errors(*, as_json: bool, debug: bool) -> Iterator[None]:
    """End the process with a message and a code when the block raises an error.

    Args:
        as_json: also print `{"error", "kind"}` on stdout.
        debug: let errors pass, so that Python shows their traceback.
    """
    try:
        with _raising_terminated():
            yield
    except click.UsageError as error:
        _show_usage(error)
        _end(error.format_message(), "UsageError", error.exit_code, as_json)
    except (KeyboardInterrupt, click.Abort) as error:
        by_term = isinstance(error.__cause__ or error, Terminated)  # click puts Abort around it
        what = "terminated" if by_term else "interrupted"
        tell(f"{what}; the same command goes on where it can")
        _end(what, "Terminated" if by_term else "KeyboardInterrupt",
             128 + (signal.SIGTERM if by_term else signal.SIGINT), as_json)
    except Exception as error:
        if debug:
            sys.excepthook = _show_traceback
            raise
        message = _message(error)
        tell(message)
        _end(message, type(error).__name__, 1, as_json)


def _message(error: Exception) -> str:
    if isinstance(error, ExtendError):
        return str(error)
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        named = isinstance(error.filename, str | bytes)  # and no number of an open file
        place = f"{os.fsdecode(error.filename)}: " if named else ""
        return f"{place}{error.strerror}; --debug shows where this happened"
    told = traceback.format_exception_only(error)[-1].strip()
    return (f"a fault of extend itself, {told}; {_keep_traceback(error)}. Please report it with "
            "what `extend env` prints")


def _show_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def _keep_traceback(error: Exception) -> str:
    """Write the traceback to a file, since what took hours is not run again just to see it."""
    text = hide_secrets("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="extend-", suffix=".log", delete=False,
                                         encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        sys.stderr.write(printable(text))
        return "its traceback is above"
    return f"its traceback is in {file.name}"


def tell(message: str) -> None:
    """Say what is wrong on stderr."""
    click.echo(f"extend: {printable(message)}", err=True)


def _show_usage(error: click.UsageError) -> None:
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()  # the whole help
        return
    if error.ctx is not None:
        click.echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help' for help.\n",
                   err=True)
    click.echo(f"Error: {printable(error.format_message())}", err=True)


def _end(message: str, kind: str, code: int, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": hide_secrets(message), "kind": kind}))
    sys.exit(code)
