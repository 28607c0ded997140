"""Exit codes, streams and messages of the command line."""

import json

import pytest
from click.testing import CliRunner

from extend.cli import main


@pytest.fixture
def invoke():
    def invoke(*args: str):
        return CliRunner().invoke(main, args)

    return invoke


COMMANDS = ["rescale", "train", "extract", "merge", "eval", "report", "run"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(invoke, command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"extend {command} " in result.output


def test_unknown_command_is_usage_and_suggests(invoke):
    result = invoke("rescal")
    assert result.exit_code == 2
    assert "did you mean 'rescale'?" in result.output


def test_bad_length_is_usage(invoke):
    result = invoke("rescale", "m", "--to", "12kb", "--out", "x")
    assert result.exit_code == 2
    assert "'12kb' is not a length in tokens" in result.output


def test_user_error_is_one_message_and_exit_code_1(invoke, tmp_path):
    result = invoke("rescale", str(tmp_path / "none"), "--to", "8k", "--out", str(tmp_path / "o"))
    assert result.exit_code == 1
    assert "config.json: no such file" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "o").exists()


def test_json_error_is_one_object(invoke, tmp_path):
    result = invoke("run", str(tmp_path / "none.yaml"), "--out", str(tmp_path), "--json")
    assert result.exit_code == 1
    assert "no such recipe" in json.loads(result.stdout)["error"]


def test_debug_shows_the_traceback(invoke, tmp_path):
    result = invoke("run", str(tmp_path / "none.yaml"), "--out", str(tmp_path), "--debug")
    assert result.exception.__class__.__name__ == "RecipeError"
