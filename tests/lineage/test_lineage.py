"""The stage and its command: table, JSON, files, and what cannot be asked for."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from extend.adapter import extract
from extend.cli import main
from extend.delta.sample import SAMPLE_NAME
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.lineage import lineage, write_lineage
from extend.manifest import outputs_intact


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    return extract(llama.base, llama.tuned, tmp_path_factory.mktemp("extracted") / "a", rank=8)


def invoke(*args):
    return CliRunner().invoke(main, ["lineage", *map(str, args)])


def test_table_has_a_line_a_layer(qwen2):
    result = invoke("--base", qwen2.base, "--target", qwen2.target)
    assert result.exit_code == 0, result.output
    found = lineage(qwen2.target, qwen2.base)
    lines = result.stdout.splitlines()
    assert lines[0] == f"{qwen2.target} against {qwen2.base}: {found.lineage.verdict()}"
    start = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    assert lines[start].split() == ["layer", "cosine", "drift", "equal", "vectors"]
    table = [line.split() for line in lines[start + 1:start + 6]]
    assert [row[0] for row in table[:4]] == ["0", "1", "model.embed_tokens.weight",
                                             "model.norm.weight"]
    assert [" ".join(row[:2]) for row in table[4:]] == ["all layers"]
    overall = found.lineage.overall
    assert table[4][2] == f"{overall.cosine().value:.5f}"
    assert table[4][3] == f"{overall.drift().value:.4f}"


def test_json_has_every_tensor_and_the_conflict(llama):
    result = invoke("--base", llama.base, "--target", llama.target, "--tuned", llama.tuned,
                    "--rank", 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tensors"].keys() == load_file(llama.base / "model.safetensors").keys()
    assert found["layers"].keys() == {"0", "1", "lm_head.weight", "model.embed_tokens.weight",
                                      "model.norm.weight"}
    report = lineage(llama.target, llama.base, tuned=llama.tuned, rank=4)
    assert found == json.loads(json.dumps(report.to_json()))
    conflict = found["layers"]["0"]["conflict"]
    assert set(conflict) == {"cosine", "left", "right", "left_chance", "right_chance"}
    # Both deltas are independent noise of rank 4 and a little more, so chance is all there is.
    assert abs(found["conflict"]["cosine"]) < 0.02
    assert found["conflict"]["left"] == pytest.approx(found["conflict"]["left_chance"], rel=0.3)


def test_conflict_columns(llama, adapter):
    result = invoke("--base", llama.base, "--target", llama.target, "--adapter", adapter)
    assert result.exit_code == 0, result.output
    header = next(line for line in result.stdout.splitlines() if line.startswith("layer "))
    assert header.split()[-3:] == ["deltas", "left", "right"]
    assert "rank\n                16, of target - base" in result.stdout


def test_files(llama, tmp_path):
    report = lineage(llama.target, llama.base, tuned=llama.tuned)
    out = write_lineage(report, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {"lineage.json", "lineage.png",
                                                     "manifest.json"}
    assert json.loads((out / "lineage.json").read_text()) == json.loads(
        json.dumps(report.to_json()))
    assert (out / "lineage.png").read_bytes().startswith(b"\x89PNG")
    assert outputs_intact(out) is None
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"base", "target", "tuned"}
    assert manifest["results"]["kind"] == "heavy"


def test_without_the_base_an_adapters_sample_is_used(llama, adapter, tmp_path):
    result = invoke("--adapter", adapter, "--target", llama.target, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "estimated from the adapter's sample of its base, 95 % intervals: cosine 0.9" in (
        result.stdout)
    assert result.stdout.rstrip().endswith(str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert found["sampled"] and found["conflict"] is None
    assert found["drift"]["low"] < found["drift"]["value"] < found["drift"]["high"]


def test_the_sample_of_the_base_itself(llama, adapter):
    """Its drift has no upper bound, which JSON has a null for."""
    result = invoke("--adapter", adapter, "--target", llama.base, "--json")
    assert json.loads(result.stdout)["drift"] == {"value": 0, "low": 0, "high": None}
    assert json.loads(result.stdout)["kind"] == "same"


def test_what_one_model_lacks_is_said(llama, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(llama.target, target)
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
              target / "model.safetensors", metadata={"format": "pt"})
    result = invoke("--base", llama.base, "--target", target)
    assert "only in the target: model.layers.0.self_attn.q_proj.bias" in result.stdout


def test_two_long_deltas(llama, adapter):
    with pytest.raises(RecipeError, match="both give the long delta"):
        lineage(llama.target, llama.base, tuned=llama.tuned, adapter=adapter)


def test_rank_of_nothing(llama):
    with pytest.raises(RecipeError, match="rank is 0"):
        lineage(llama.target, llama.base, rank=0)


def test_no_base_at_all(llama):
    result = invoke("--target", llama.target)
    assert result.exit_code == 1
    assert "base is missing" in result.stderr


def test_a_long_model_needs_the_base(llama):
    with pytest.raises(RecipeError, match="base is missing"):
        lineage(llama.target, tuned=llama.tuned)


def test_an_adapter_without_a_sample(llama, adapter, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(adapter, older)
    (older / SAMPLE_NAME).unlink()
    with pytest.raises(CheckpointError, match=rf"holds no {SAMPLE_NAME}.*--base"):
        lineage(llama.target, adapter=older)


def test_out_that_holds_an_input(copies):
    report = lineage(copies.target, copies.base)
    with pytest.raises(RecipeError):
        write_lineage(report, copies.target.parent, overwrite=True)
    assert copies.target.is_dir()


def test_a_model_of_zeros_is_refused(llama, tmp_path):
    """A file that was only given its size reads as zeros; no cosine can be told of them."""
    shutil.copytree(llama.target, tmp_path / "hollow")
    file = tmp_path / "hollow" / "model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, file)
    with pytest.raises(CompatibilityError, match="every matrix of the decoder layers is zero"):
        lineage(tmp_path / "hollow", llama.base)
