"""How commands fail, and what a shell, a script and a bug report get."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from extend import environment
from extend.cli import main
from extend.cli.group import to_json
from extend.environment import describe_environment, hide
from extend.errors import RecipeError

NUMBERS = ("--head-dim", "128", "--theta", "500000", "--from", "8k", "--to", "64k")


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """`failing(error)` makes `extend plan` raise it; tracebacks are kept in `tmp_path`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(error):
        def plan(*_, **__):
            raise error

        monkeypatch.setattr(import_module("extend.plan"), "plan", plan)

    return fail


@pytest.mark.parametrize(("arguments", "message"), [
    (["plna"], "no command 'plna'; did you mean 'plan'? choose one of init, validate, run"),
    (["plan", "--shcedule", "1m"], "--schedule"),
    (["eval", "m", "--template", "caht"], "unknown 'caht'; did you mean 'chat'? choose one of"),
    (["rescale", "m", "--to", "8k", "--method", "yran"], "unknown 'yran'; did you mean 'yarn'?"),
    (["cut", "--adapter", "a", "--dtype", "bflot16"], "did you mean 'bfloat16'?"),
    (["completion", "bsah"], "unknown 'bsah'; did you mean 'bash'? choose one of bash, zsh, fish"),
    (["run", "r.yaml"], "Missing option '--out'")])
def test_wrong_usage_suggests_and_is_json_where_asked(arguments, message):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "") and message in result.stderr
    for given in (["--json", *arguments], [*arguments, "--json"]):
        told = json.loads(invoke(*given).stdout)
        assert message in told["error"] and told["kind"] == "UsageError"


def test_without_a_command_there_is_help():
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ") and "Error" not in result.stderr


def test_a_fault_is_one_line_and_its_traceback_is_kept(failing, tmp_path):
    failing(ZeroDivisionError("a \x1b[31m"))
    result = invoke("plan", *NUMBERS, "--json")
    kept, = tmp_path.glob("extend-*.log")
    assert result.exit_code == 1
    assert result.stderr == (
        "extend: a fault of extend itself, ZeroDivisionError: a \\x1b[31m; its traceback is in "
        f"{kept}. Please report it with what `extend env` prints\n")
    assert json.loads(result.stdout)["kind"] == "ZeroDivisionError"
    assert "in plan\n    raise error" in kept.read_text()


def test_what_libraries_print_is_not_on_stdout(monkeypatch):
    def plan(*_, **__):
        sys.stdout.write("100%|####| a bar\n")
        raise RecipeError("no")

    monkeypatch.setattr(import_module("extend.plan"), "plan", plan)
    result = invoke("plan", *NUMBERS, "--json")
    assert json.loads(result.stdout) == {"error": "no", "kind": "RecipeError"}
    assert result.stderr == "100%|####| a bar\nextend: no\n"


@pytest.mark.parametrize("place", [0, 1])
def test_debug_before_and_after_the_command(place, failing):
    failing(ZeroDivisionError("a"))
    arguments = ["plan", *NUMBERS]
    arguments.insert(place, "--debug")
    assert isinstance(invoke(*arguments).exception, ZeroDivisionError)


@pytest.mark.parametrize(("error", "code", "message"), [
    (PermissionError(13, "Permission denied", "a/b"), 1,
     "extend: a/b: Permission denied; --debug shows where this happened"),
    (OSError(28, "No space left on device"), 1,
     "extend: No space left on device; --debug shows where this happened"),
    (KeyboardInterrupt(), 130, "extend: interrupted; the same command goes on where it can")])
def test_what_the_machine_or_the_user_does(error, code, message, failing, tmp_path):
    failing(error)
    result = invoke("plan", *NUMBERS)
    assert (result.exit_code, result.stderr.strip()) == (code, message)
    assert not list(tmp_path.iterdir())


def test_json_is_json_also_of_numbers_that_are_not_finite():
    assert to_json({"a": [1.5, float("nan")], "b": {"c": float("-inf")}, "d": Path("x")}) == \
        '{"a": [1.5, null], "b": {"c": null}, "d": "x"}'


@pytest.mark.parametrize(("words", "told"), [
    ("va", ["validate"]), ("plan --sch", ["--schedule"]), ("init dem", ["demo"]),
    ("plan --method ntk", ["ntk", "ntk-by-parts"]), ("merge --method ort", ["orthogonal"]),
    ("eval m --tasks loss,passkey-t", ["loss,passkey-text"]),
    ("doctor d --readers vllm-", ["vllm-old"]), ("run ", ["a file"]),
    ("merge --target ", ["a file"]), ("rescale ", ["a file"])])
def test_shells_complete_commands_options_choices_names_and_paths(words, told):
    *before, last = words.split(" ")
    found = ShellComplete(main, {}, "extend", "_EXTEND_COMPLETE").get_completions(before, last)
    assert [f"a {item.type}" if item.type != "plain" else item.value for item in found] == told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_reads(shell):
    script = invoke("completion", shell).stdout
    assert f"_EXTEND_COMPLETE={shell}_complete" in script
    assert json.loads(invoke("completion", shell, "--json").stdout)["script"] == script.strip("\n")


TOPO = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-15\t0\tN/A
GPU1\tNV18\t X \tSYS\t16-31\t1\tN/A
NIC0\tPIX\tSYS\t X
"""


def test_env_tells_versions_gpus_and_links_and_no_secret(monkeypatch):
    asked = {"--query-gpu=name,memory.total,driver_version":
             "NVIDIA H200, 143771 MiB, 570.1\nNVIDIA H200, 143771 MiB, 570.1", "topo": TOPO.strip()}
    monkeypatch.setattr(environment, "_output", lambda command: asked.get(command[1]))
    for name, value in {"HF_TOKEN": "hf_abcdefghij", "EXTEND_API_KEY": "sesame",
                        "HF_ENDPOINT": "https://me:pw@hub", "MY_PASSWORD": "sesame",
                        "NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false",
                        "HF_HOME": str(Path.home() / "hub")}.items():
        monkeypatch.setenv(name, value)
    found = describe_environment()
    assert found["gpus"] == 2 * [
        {"name": "NVIDIA H200", "memory": "143771 MiB", "driver": "570.1"}]
    assert found["links"] == {"GPU0": {"GPU1": "NV18"}, "GPU1": {"GPU0": "NV18"}}
    assert found["variables"].items() >= {
        "HF_TOKEN": "set", "EXTEND_API_KEY": "set", "HF_ENDPOINT": "https://***@hub",
        "NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": "~/hub"}.items()
    import torch

    assert found["packages"]["torch"] == torch.__version__
    assert found["torch"]["devices"] == torch.cuda.device_count()
    for text in (json.dumps(found), invoke("env").stdout):
        for secret in ("abcdefghij", "sesame", "pw", "MY_PASSWORD"):
            assert secret not in text
    assert json.loads(invoke("env", "--json").stdout)["packages"] == found["packages"]


def test_what_is_hidden():
    home = Path.home()
    assert hide(f"{home}/a:{home}:{home}b") == f"~/a:~:{home}b"
    assert hide("http://u:p@h/x and hf_0123456") == "http://***@h/x and ***"


def test_env_without_a_driver():
    assert environment._output(["no-such-program-here"]) is None
    assert environment._output([sys.executable, "-c", "import sys; sys.exit(1)"]) is None
