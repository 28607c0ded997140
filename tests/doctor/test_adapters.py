"""`extend doctor` on an adapter: the RoPE of its sidecar, and the engines that would serve it."""

import json

import pytest
from click.testing import CliRunner

from extend.adapter import extract
from extend.cli import main
from extend.doctor import doctor
from extend.errors import CheckpointError, CompatibilityError
from tests.adapter_format.serving_cases import CASES, write_case


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of many ranks, from the tiny Llama."""
    import torch

    from tests.adapter_format.tiny_models import make_models

    root = tmp_path_factory.mktemp("doctor")
    models = make_models(root, "llama", torch.float32)
    return extract(models.base, models.tuned, root / "adapter", adapter_bytes=40_000)


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["doctor", *map(str, arguments)])
    return result.exit_code, result.output


def test_ranks_that_differ_fail_with_sglang(adapter):
    code, text = run(adapter)
    assert code == 1
    assert "error: served by sglang [sglang]" in text and "rank_pattern is not read" in text
    assert "warning: sidecar" in text and "--fold-norms" in text
    assert [line.split()[:3] for line in text.splitlines() if " 0." in line][:3] == [
        ["vllm-old", "0.11.0", "ok"], ["vllm", "0.33.0", "ok"], ["sglang", "0.5.23", "refuses"]]


def test_engines_that_are_not_asked_for_do_not_count(adapter):
    code, text = run(adapter, "--readers", "vllm,transformers-5")
    assert code == 0 and "sglang" not in text.replace("[vllm]", "")


def test_json_has_the_verdicts(adapter):
    code, text = run(adapter, "--json", "--quiet")
    found = json.loads(text[text.index("{"):text.rindex("}") + 1])
    assert code == 1 and not found["ok"]
    assert found["serving"]["vllm"]["max_lora_rank"] in (8, 16, 32, 64)
    assert found["serving"]["sglang"]["problems"][0]["verdict"] == "refuses"


def test_fix_writes_a_form_that_passes(adapter, tmp_path):
    code, text = run(adapter, "--fix", "--out", tmp_path / "servable")
    assert code == 0, text
    assert f"written: {tmp_path / 'servable'}" in text
    assert run(tmp_path / "servable")[0] == 0


def test_fix_in_place_is_refused(adapter):
    with pytest.raises(CompatibilityError, match="not changed in place.*--out"):
        doctor(adapter, fix=True)


@pytest.mark.parametrize(("case", "ok"), [("plain", True), ("rslora", False), ("dora", False),
                                          ("ranks differ between projections", False)])
def test_adapters_of_other_programs(case, ok, tmp_path):
    write_case(tmp_path / "adapter", CASES[case])
    (tmp_path / "adapter" / "extend_sidecar.json").unlink()
    found = doctor(tmp_path / "adapter")
    assert found.ok == ok, found.to_text()
    assert any("nothing says which RoPE" in f.message for f in found.findings)


def test_a_form_that_does_not_exist_is_not_written(tmp_path):
    write_case(tmp_path / "adapter", CASES["dora"])
    (tmp_path / "adapter" / "extend_sidecar.json").unlink()
    with pytest.raises(CompatibilityError, match="DoRA"):
        doctor(tmp_path / "adapter", fix=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_weights(tmp_path):
    write_case(tmp_path / "adapter", CASES["plain"])
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model"):
        doctor(tmp_path / "adapter")
