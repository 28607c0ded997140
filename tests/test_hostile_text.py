"""Text from outside, and secrets: what is shown and recorded of them.

The marked token goes through everything that tells or keeps text; it must come out of nothing.
"""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import extend.cli
from extend.cli.failing import telling_errors
from extend.console import showing_logs
from extend.environment import describe_environment
from extend.errors import CheckpointError, CompatibilityError
from extend.evaluate.frame import Frame
from extend.hub import hide_tokens
from extend.loading import read_hf_config
from extend.manifest import MANIFEST_NAME, Manifest
from extend.page import render
from extend.publish.card import _template
from extend.run_record import RECIPE_RECORD, RUN_RECORD, keep_recipe, note_end, note_start
from extend.secrets import hide_secrets, without_secrets
from extend.tokenizer import load_tokenizer
from tests.tiny_text import make_tokenizer

MARK = "mArKeDtOkEnThAtMuStNoTsHoW00"
TOKEN = f"hf_{MARK}"
PLAIN = "a-key-of-a-service-without-a-known-look"
HOSTILE = f"\x1b]0;x\x07\u202e<script>alert(1)</script>\"'&{TOKEN}"


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", PLAIN)


def harmless(text: str) -> str:
    assert MARK not in text and PLAIN not in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    return text


@pytest.mark.parametrize("secret", [
    TOKEN, PLAIN, "ghp_" + "a" * 36, "sk-" + "a" * 32, "AKIA" + "A" * 16,
    "-----BEGIN RSA PRIVATE KEY-----"])
def test_what_is_a_secret(secret):
    assert secret not in hide_secrets(f"a {secret} b") and hide_secrets("a b") == "a b"
    assert secret not in json.dumps(without_secrets({"a": [{secret: secret}], "n": 1}))
    assert hide_secrets("https://u:pass@h/x") == "https://***@h/x"
    assert hide_secrets("hf_attention.py and a hf_home") == "hf_attention.py and a hf_home"
    assert hide_tokens(f"x {TOKEN}") == "x ***"


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO, logging.DEBUG])
def test_logs(level, capsys):
    with showing_logs(level):
        logging.getLogger("extend.x").warning("read %s", HOSTILE)
        logging.getLogger("library.x").error("read %s", HOSTILE)
    told = harmless(capsys.readouterr().err)
    assert told.count("***") == 2 and r"\x1b" in told


@pytest.mark.parametrize("error", [CheckpointError(HOSTILE), ValueError(HOSTILE),
                                   OSError(2, HOSTILE, f"/{HOSTILE}")])
def test_errors_and_their_tracebacks(error, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit), telling_errors(as_json=True, debug=False):
        raise error
    captured = capsys.readouterr()
    harmless(captured.err)
    assert MARK not in captured.out and "\x1b" not in captured.out
    for log in tmp_path.glob("extend-*.log"):
        assert MARK not in log.read_text()
    hook = sys.excepthook
    try:
        with pytest.raises(type(error)), telling_errors(as_json=False, debug=True):
            raise error
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.excepthook = hook
    assert "Traceback" in harmless(capsys.readouterr().err)


def test_records(tmp_path):
    (tmp_path / "in").write_text("x")
    made = Manifest("merge", {"in": tmp_path / "in"}, {"server": f"http://h/{TOKEN}", "k": [PLAIN]})
    (tmp_path / "out").mkdir()
    made.write(tmp_path / "out", said=HOSTILE)
    keep_recipe(tmp_path, {"text": f"token: {TOKEN}"})
    note_start(tmp_path, "a", "f", {"fingerprint": None, "manifest": None}, [])
    note_end(tmp_path, "a", "failed", f"refused {HOSTILE}")
    for path in (tmp_path / "out" / MANIFEST_NAME, tmp_path / RECIPE_RECORD, tmp_path / RUN_RECORD):
        text = path.read_text()
        assert MARK not in text and PLAIN not in text and "***" in text


def test_the_environment():
    assert MARK not in json.dumps(describe_environment())
    result = CliRunner().invoke(extend.cli.main, ["env"])
    assert result.exit_code == 0 and MARK not in result.output and "HF_TOKEN: set" in result.output


@pytest.mark.parametrize("place", ["text", "attribute", "list"])
def test_pages(place, tmp_path):
    inner = {"text": "{{ value }}", "attribute": '<a title="{{ value }}">x</a>',
             "list": "{% for v in [value] %}{{ v }}{% endfor %}"}[place]
    (tmp_path / "t.html.jinja").write_text(
        '{% extends "page.html.jinja" %}{% block body %}' + inner + "{% endblock %}")
    page = harmless(render(tmp_path / "t.html.jinja", title=HOSTILE, value=HOSTILE,
                           subtitle=HOSTILE))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_cards():
    template = _template().environment.from_string("{{ value }} {{ value | cell }}")
    harmless(template.render(value=HOSTILE))


def test_names_on_the_command_line(tmp_path):
    result = CliRunner().invoke(extend.cli.main, ["doctor", str(tmp_path / HOSTILE[:9])])
    assert result.exit_code == 1 and "\x1b" not in result.stderr and r"\x1b" in result.stderr


def test_code_beside_a_model_is_never_run(tmp_path):
    """No option, no variable and no question: such a model is refused."""
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n"
                                      "class Config: pass\nclass Tokenizer: pass\n")
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "evil", "auto_map": {"AutoConfig": "evil.Config",
                                           "AutoTokenizer": "evil.Tokenizer"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    with pytest.raises(CompatibilityError):
        read_hf_config(tmp_path)
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)
    assert not ran.exists()


def test_every_loader_says_so():
    """What transformers loads, it loads with remote code off and without a question."""
    calls = [(path, call) for path in (Path(extend.__file__).parent).rglob("*.py")
             if path.name not in ("loading.py", "hf_attention.py") or path.parent.name == "extend"
             for call in re.findall(r"Auto\w+\.from_pretrained\((?:[^()]|\([^()]*\))*\)",
                                    path.read_text())]
    assert len(calls) >= 4
    assert [path for path, call in calls if "trust_remote_code=False" not in call
            and "repo" not in call] == []


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}{% endfor %}", "{{ cycler.__init__.__globals__.os }}",
    "{% include '/etc/passwd' %}", "{{ messages[0].content", "{{ 1 / 0 }}"])
def test_chat_templates_run_in_the_sandbox(template):
    tokenizer = make_tokenizer("bytes")
    tokenizer.chat_template = template + " {{ messages[0]['content'] }}"
    with pytest.raises(CompatibilityError, match="the chat template"):
        Frame.of(tokenizer, "chat")
