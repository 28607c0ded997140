"""`extend doctor`: streams, exit codes, JSON."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from extend.cli import main
from extend.doctor.readers import READERS
from tests.doctor.configs import LLAMA3, llama, load, save, scaled

PLAIN = {"rope_type": "default", "rope_theta": 5e5}


@pytest.fixture
def broken(tmp_path):
    return save(tmp_path / "broken", llama(rope_parameters=PLAIN))


@pytest.fixture
def healthy(tmp_path):
    return save(tmp_path / "healthy", scaled(LLAMA3))


def invoke(*arguments):
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def test_healthy(healthy):
    result = invoke(healthy)
    assert result.exit_code == 0 and not result.stderr
    lines = result.stdout.splitlines()
    heading = lines.index("reader            theta   inv_freq      attention  max length")
    rows = [line.split() for line in lines[heading + 1:heading + 1 + len(READERS)]]
    assert [row[0] for row in rows] == list(READERS)
    assert len({tuple(row[1:]) for row in rows}) == 1 and rows[0][1] == "500000"
    assert f"agree: {', '.join(READERS)}" in lines


def test_broken(broken):
    result = invoke(broken)
    assert result.exit_code == 1
    assert result.stderr == f"extend: {broken}: does not pass: 1 error (frequencies); " \
                            "see the report\n"
    assert "error: frequencies [transformers-4.4, transformers-4, vllm-old]" in result.stdout
    assert "agree: transformers-5, vllm, sglang, llama.cpp" in result.stdout
    assert "config.json: rope_theta: (absent) -> 500000.0" in result.stdout


@pytest.mark.parametrize("ok", [True, False])
def test_json_is_one_object(ok, healthy, broken):
    result = invoke(healthy if ok else broken, "--json")
    assert result.exit_code == (0 if ok else 1)
    report = json.loads(result.stdout)
    assert report["ok"] is ok
    assert set(report["readers"]) == set(READERS)
    row = report["readers"]["transformers-4"]
    assert row["rope_theta"] == (5e5 if ok else 1e4) and row["max_len"] == 4096
    assert row["attention_factor"] == 1.0 and len(row["inv_freq_sha"]) == 12
    assert report["agree"][0] and set(report["findings"][0]) == {
        "severity", "what", "readers", "message", "remedy", "avoidable"}
    assert result.stdout.count("\n") == 1


def test_json_of_an_error_is_one_object(tmp_path):
    result = invoke(tmp_path, "--json")
    assert result.exit_code == 1 and set(json.loads(result.stdout)) == {"error", "kind"}


def test_fix(broken, tmp_path):
    result = invoke(broken, "--fix", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert f"written: {tmp_path / 'out'}" in result.stdout
    assert load(tmp_path / "out")["rope_theta"] == 5e5
    report = json.loads(invoke(broken, "--fix", "--json").stdout)
    assert report["ok"] and report["output"] == str(broken)
    assert report["changes"]["config.json: rope_theta"] == "(absent) -> 500000.0"


def test_options(tmp_path):
    model = save(tmp_path / "model", llama(
        rope_theta=1e6, rope_parameters=PLAIN, max_position_embeddings=1234))
    result = invoke(model, "--theta", "8e6", "--max-length", "128k", "--fix")
    assert result.exit_code == 0, result.output
    assert load(model)["rope_theta"] == 8e6
    assert load(model)["max_position_embeddings"] == 131072


def test_chosen_readers(broken):
    result = invoke(broken, "--readers", "transformers-5,vllm")
    assert result.exit_code == 0 and "transformers-4" not in result.stdout
    result = invoke(broken, "--readers", "vlm")
    assert result.exit_code == 1 and "did you mean 'vllm'" in result.stderr


def test_a_module_of_its_own(healthy):
    """In a fresh process, as users call it."""
    run = subprocess.run([sys.executable, "-m", "extend", "doctor", str(healthy)],
                         capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr and "agree:" in run.stdout
