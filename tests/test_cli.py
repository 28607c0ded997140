"""Exit codes, streams and messages of the command line."""

import json
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import extend.rope
from extend.cli import main
from extend.cli.group import SECTIONS


@pytest.fixture
def invoke():
    def invoke(*args: str):
        return CliRunner().invoke(main, args)

    return invoke


COMMANDS = sorted(main.commands)
NUMBERS = ("--head-dim", "128", "--theta", "500000", "--from", "8k")


@pytest.mark.filterwarnings("error")  # as click warns of an option that is there twice
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(invoke, command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"extend {command} " in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_declared_once_and_says_what_it_is(command):
    params = main.commands[command].params
    names = [name for param in params for name in param.opts]
    assert sorted(names) == sorted(set(names))  # click warns on stderr whenever it is run
    told = {param.opts[-1]: param.help for param in params if isinstance(param, click.Option)}
    assert [name for name, text in told.items()
            if not text and name not in ("--seed", "--device", "--lr", "--steps")] == []


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


SLOW = {"torch", "numpy", "transformers", "matplotlib", "pydantic", "yaml", "rich", "jinja2",
        "huggingface_hub", "importlib.metadata", "asyncio", "multiprocessing"}


def test_help_of_every_command_imports_nothing_slow_and_as_a_module():
    """What takes time is imports; seconds would say more of the machine's other work."""
    code = ("import json, sys; sys.argv[1:] = ['--help']\n"
            "from extend.cli import main\n"
            "for name in ['', *main.commands]:\n"
            "    main([*name.split(), '--help'], standalone_mode=False, prog_name='extend')\n"
            "told = [list(sys.modules), list(main.commands)]\n"
            "import extend.doctor.readers, extend.evaluate.tasks, extend.merge.methods\n"
            "print(json.dumps([*told, 'torch' in sys.modules]), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, commands, is_torch_loaded = json.loads(done.stderr)
    assert not is_torch_loaded  # by what completes names: nobody waits seconds for a shell
    assert set(commands) == set(COMMANDS)
    assert SLOW & set(modules) == set()
    assert len(modules) < 330  # Python, click and the command line; 270 when this was written
    module = subprocess.run([sys.executable, "-m", "extend", "-h"], capture_output=True, text=True,
                            check=True)
    assert module.stdout == done.stdout[:len(module.stdout)]


def test_commands_stand_in_the_order_of_the_pipeline(invoke):
    text = invoke("--help").output
    names = [name for members in SECTIONS.values() for name in members]
    assert len(names) == len(set(names))
    assert set(COMMANDS) <= set(names), "give a new command its place in SECTIONS"
    shown = re.findall(r"^  ([a-z-]+)  +\S", text, re.MULTILINE)
    assert [name for name in shown if name in COMMANDS] == [n for n in names if n in COMMANDS]
    assert "..." not in text.partition("\n")[2]
    assert text.rstrip().endswith("extend run demo.yaml --out runs/demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_help_are_read_as_they_stand(command):
    """Names of options and choices, and that nothing is missing; nothing is run."""
    for line in examples(command):
        words = shlex.split(line, comments=True)
        words = words[words.index("extend") + 1:]
        words = words[:words.index(">")] if ">" in words else words
        with main.make_context("extend", words, resilient_parsing=False) as ctx:
            name, found, rest = main.resolve_command(ctx, [*ctx._protected_args, *ctx.args])
            found.make_context(name, rest, parent=ctx)


def examples(command):
    text = main.commands[command].help.replace("\\\n", " ").split("\b\n")[-1]
    return [line.strip() for line in text.splitlines()
            if re.match(r"\s*(extend|torchrun)\s", line)]


@pytest.mark.parametrize("command", ["plan", "rescale"])
def test_help_names_every_method(invoke, command):
    text = re.sub(r"\s+", " ", invoke(command, "--help").output)
    assert ", ".join(extend.rope.METHODS) in text


@pytest.mark.parametrize("value", ["[1", "{", "a: b: c", "'"])
def test_an_option_that_cannot_be_read_is_one_message(invoke, value):
    result = invoke("plan", *NUMBERS, "--to", "64k", "--method", "yarn", "-o", f"beta_fast={value}")
    assert result.exit_code == 1
    assert "its value cannot be read" in result.stderr
    assert result.stderr.count("\n") == 1


def test_rescale_passes_the_native_length_to_start_from(invoke, monkeypatch, tmp_path):
    given = {}

    def rescale(model, out, **arguments):
        given.update(arguments)
        return out

    monkeypatch.setattr(extend.rope, "rescale", rescale)
    result = invoke("rescale", "m", "--to", "64k", "--from", "8k", "--out", str(tmp_path / "o"),
                    "-o", "rope_theta=8e6", "--method", "theta")
    assert result.exit_code == 0, result.output
    assert (given["from_len"], given["target_len"]) == (8192, 65536)
    assert (given["method"], given["rope_theta"]) == ("theta", 8e6)
    given.clear()
    invoke("rescale", "m", "--to", "64k", "--out", str(tmp_path / "o"))
    assert given["from_len"] is None


@pytest.mark.parametrize("name", ["model", "out", "from_len", "target_len", "method", "overwrite"])
def test_what_rescale_takes_itself_is_no_option_of_a_method(invoke, name):
    result = invoke("rescale", "m", "--to", "64k", "--out", "o", "-o", f"{name}=1")
    assert result.exit_code == 1
    assert f"{name} is no option of a RoPE method" in result.stderr


def test_plan_as_json(invoke):
    result = invoke("plan", *NUMBERS, "--to", "128k", "--json")
    assert result.exit_code == 0, result.output
    rope = json.loads(result.stdout)["rope"]
    assert rope["critical_index"] == pytest.approx(34.98411900147241, rel=1e-12)
    critical = rope["methods"]["critical"]
    assert critical["theta"] == pytest.approx(79760692.221776, rel=1e-12)
    assert len(critical["inv_freq"]) == 64
    assert critical["attention_factor"] == 1


def test_plan_as_tables_and_files(invoke, tmp_path):
    out = tmp_path / "plan"
    result = invoke("plan", *NUMBERS, "--schedule", "64k,1m", "--method", "ntk", "--out", str(out))
    assert result.exit_code == 0, result.output
    for text in ("RoPE from 8,192 to 1,048,576 tokens (factor 128)", "pairs of ntk",
                 "stages with ntk", "69,123,823"):
        assert text in result.stdout
    assert result.stdout.splitlines()[-1] == str(out)
    assert (out / "plan.json").is_file()


def test_plan_says_which_length_is_too_short(invoke, tmp_path):
    result = invoke("plan", *NUMBERS, "--to", "4k", "--out", str(tmp_path / "plan"))
    assert result.exit_code == 1
    assert result.stderr.startswith("extend: target length 4096 is below the model's native length "
                                    "8192")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--to", "64k"], "give MODEL, or --head-dim, --theta and --from together"),
    (["--to", "64k", "--head-dim", "64", "--from", "8k"], "give MODEL, or --head-dim"),
    (["m", "--to", "64k", "--theta", "1e4"], "take the place of MODEL"),
    (["m"], "give --to LENGTH, or --schedule"),
    (["m", "--to", "64k", "-o", "factor=2"], "--option belongs to a --method"),
    (["m", "--to", "64k", "--method", "nkt"], "unknown 'nkt'; did you mean 'ntk'? choose one of"),
    (["m", "--schedule", "64k,64kb"], "'64kb' is not a length in tokens")])
def test_wrong_usage_of_plan(invoke, arguments, message):
    result = invoke("plan", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
