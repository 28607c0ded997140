"""What the command line keeps from being logged of keys that other engines need."""

import json
import logging

import pytest
from click.testing import CliRunner
from transformers import AutoConfig

from extend.cli import main
from extend.cli.group import _logging
from tests.rope.conftest import NATIVE, edit_config


@pytest.fixture
def quiet(llama, tmp_path, monkeypatch, caplog):
    """A model whose keys transformers does not all know, and what a command logs by."""
    result = CliRunner().invoke(main, [
        "rescale", str(llama), "--to", str(4 * NATIVE), "--method", "yarn", "-o",
        "attention_factor=1.0", "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    with _logging(verbose=False, quiet=False):
        yield tmp_path / "out"


def test_keys_for_other_engines_are_no_news(quiet, caplog):
    assert "attn_factor" in json.loads((quiet / "config.json").read_text())["rope_parameters"]
    AutoConfig.from_pretrained(quiet)
    assert "Unrecognized keys" not in caplog.text


def test_other_unknown_keys_are(quiet, caplog):
    entries = json.loads((quiet / "config.json").read_text())["rope_parameters"]
    edit_config(quiet, rope_parameters={**entries, "fctor": 4.0}, rope_scaling=None)
    AutoConfig.from_pretrained(quiet)
    assert "Unrecognized keys" in caplog.text and "fctor" in caplog.text
