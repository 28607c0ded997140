"""What is logged: bars on a terminal, a line a minute elsewhere, nothing that steers a terminal."""

import logging
import os
import pty
import re
import select
import subprocess
import sys
from importlib import import_module

import pytest
from click.testing import CliRunner

from extend import console
from extend.cli import main
from extend.console import printable, progress, showing_logs
from extend.errors import RecipeError

log = logging.getLogger("extend.some.stage")

WORK = """\
import logging, sys
from extend.console import progress, showing_logs
log = logging.getLogger("extend.stage")
with showing_logs(int(sys.argv[1])):
    log.info("[1/2] long (train)")
    for step in range(1, 4):
        log.info(f"step {step}/3: loss [1] \\x1b]0;owned\\x07", extra=progress(step, 3))
    log.warning("a warning")
    log.debug("a detail")
"""


@pytest.mark.parametrize(("text", "shown"), [
    ("plain \t text\n", "plain \t text\n"),
    ("a\x1b[31mb", r"a\x1b[31mb"),
    ("a\rb\x08\x9b2J\x7f", r"a\rb\x08\x9b2J\x7f"),
    ("\u202eevil\u2066", r"\u202eevil\u2066"),
    ("caf\xe9 \u4e2d", "caf\xe9 \u4e2d"),
    (os.fsdecode(b"p\xff"), r"p\udcff")])
def test_what_would_steer_a_terminal_is_escaped(text, shown):
    assert printable(text) == shown


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_file_gets_a_line_a_minute_and_every_warning(clock, capsys):
    with showing_logs(logging.INFO):
        log.info("[1/9] rescaled")
        log.info("[2/9] long")
        for step in range(1, 200):
            clock.now += 1
            log.info("step %d", step, extra=progress(step, 200))
            if step == 10:
                log.warning("odd")
    assert capsys.readouterr().err.splitlines() == ["odd", "[2/9] long", "step 60", "step 120",
                                                   "step 180"]


@pytest.mark.parametrize(("level", "rank", "told"), [
    (logging.WARNING, 0, ["bad"]), (logging.DEBUG, 0, ["1", "2", "detail", "bad"]),
    (logging.INFO, 0, ["bad"]), (logging.DEBUG, 1, ["bad"])])
def test_verbosity(level, rank, told, capsys):
    with showing_logs(level, rank=rank):
        log.info("1")
        log.info("2", extra=progress(1, 2))
        log.debug("detail")
        log.warning("bad")
    assert capsys.readouterr().err.splitlines() == told


def test_what_torchao_says_as_it_is_imported_is_for_verbose_only(capsys):
    """transformers imports it for everybody who has it; each command began with five such lines."""
    for level in (logging.INFO, logging.DEBUG):
        with showing_logs(level):
            logging.getLogger("torchao.kernel.intmm").warning("no triton, at %d", level)
            logging.getLogger("torchao").error("broken, at %d", level)
    assert capsys.readouterr().err.splitlines() == ["broken, at 20", "no triton, at 10",
                                                    "broken, at 10"]


def test_levels_and_handlers_are_as_before():
    root, own = logging.getLogger(), logging.getLogger("extend")
    before = (root.level, own.level, list(root.handlers))
    with pytest.raises(KeyError), showing_logs(logging.DEBUG):
        assert len(root.handlers) == len(before[2]) + 1
        raise KeyError
    assert (root.level, own.level, list(root.handlers)) == before


def on_a_terminal(*arguments, **environment):
    """What a program writes to a terminal that is its stderr."""
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", WORK, *arguments], stdout=follower,
                               stderr=follower, env={**os.environ, "COLUMNS": "100",
                                                     "TERM": "xterm", **environment})
    os.close(follower)
    written = b""
    while select.select([leader], [], [], 30)[0]:
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux, once the other end is closed
            break
        if not data:
            break
        written += data
    os.close(leader)
    assert process.wait() == 0
    return written.decode()


def test_a_terminal_gets_a_bar_and_lines_above_it():
    shown = on_a_terminal("20")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain)]
    assert "[1/2] long (train)" in lines and "a warning" in lines
    assert r"step 3/3: loss [1] \x1b]0;owned\x07" in lines  # the last one stays when the bar goes
    assert re.search(r"━ 1/3 ", plain)
    assert "\x1b]0;" not in shown and "a detail" not in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > -1  # the cursor is shown again


def test_terminals_without_colour_or_cursor():
    shown = on_a_terminal("20", TERM="dumb")
    assert "\x1b" not in shown and shown.count("step ") == 3
    assert not re.search(r"\x1b\[[0-9;]*3\dm", on_a_terminal("20", NO_COLOR="1"))


def test_quiet_on_a_terminal_is_quiet():
    assert on_a_terminal("30").split("\r\n") == ["a warning", ""]


@pytest.mark.parametrize("arguments", [["-v", "plan"], ["plan", "-v"], ["plan", "--verbose"]])
def test_verbose_before_and_after_the_command(arguments, monkeypatch):
    def plan(*_, **__):
        log.debug("a detail")
        raise RecipeError("that is all")

    monkeypatch.setattr(import_module("extend.plan"), "plan", plan)
    result = CliRunner().invoke(main, [*arguments, "m", "--to", "8k"])
    assert result.stderr == "a detail\nextend: that is all\n"
