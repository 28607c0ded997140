"""What `--fix` leaves on the disk."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from extend.doctor import doctor
from extend.doctor.fix import KEPT_SUFFIX
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from tests.doctor.configs import LLAMA3, YARN, llama, load, save, scaled

PLAIN = {"rope_type": "default", "rope_theta": 5e5}
FREQUENCIES = 5e5 ** (-torch.arange(0, 16, 2) / 16)


@pytest.fixture
def model(tmp_path):
    """A checkpoint with weights that transformers 4 reads as theta 10000."""
    directory = save(tmp_path / "model", llama(rope_parameters=PLAIN, torch_dtype="bfloat16"),
                     tokenizer={"model_max_length": 512, "unk_token": "ü"},
                     generation={"max_length": 512, "do_sample": False})
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, directory / "model.safetensors")
    (directory / "LICENSE").write_text("free")
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_text("{}")
    return directory


def contents(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes()
            for p in directory.rglob("*") if p.is_file()}


def test_in_place_keeps_the_old_files(model):
    before = contents(model)
    found = doctor(model, fix=True)
    assert found.ok and found.output == model
    after = contents(model)
    changed = ["config.json", "tokenizer_config.json", "generation_config.json"]
    for name in changed:
        assert after.pop(name) != before[name]
        assert after.pop(name + KEPT_SUFFIX) == before.pop(name)
    assert after == before
    config = load(model)
    assert config["rope_theta"] == 5e5 and config["torch_dtype"] == "bfloat16"
    assert load(model, "tokenizer_config.json") == {"model_max_length": 4096, "unk_token": "ü"}
    assert load(model, "generation_config.json") == {"do_sample": False}


def test_only_changed_files_are_kept(tmp_path):
    model = save(tmp_path / "model", llama(rope_parameters=PLAIN), tokenizer={"a": 1})
    doctor(model, fix=True)
    assert sorted(contents(model)) == ["config.json", "config.json" + KEPT_SUFFIX,
                                       "tokenizer_config.json"]


def test_again_writes_nothing(model):
    doctor(model, fix=True)
    before = contents(model)
    again = doctor(model, fix=True)
    assert again.ok and again.output is None and not again.changes
    assert contents(model) == before


def test_kept_files_of_an_earlier_fix_are_not_lost(model):
    (model / ("config.json" + KEPT_SUFFIX)).write_text("mine")
    before = contents(model)
    with pytest.raises(CheckpointError, match="earlier fix"):
        doctor(model, fix=True)
    assert contents(model) == before


def test_out_links_the_weights_and_copies_the_rest(model, tmp_path):
    before = contents(model)
    out = tmp_path / "out"
    assert doctor(model, fix=True, out=out).output == out
    assert contents(model) == before
    assert os.path.samefile(out / "model.safetensors", model / "model.safetensors")
    written = contents(out)
    assert set(written) == set(before)
    same = {name for name in before if written[name] == before[name]}
    assert same == {"model.safetensors", "LICENSE", "original/params.json"}


def test_out_of_a_healthy_checkpoint_is_a_copy(tmp_path):
    model = save(tmp_path / "model", scaled(LLAMA3))
    found = doctor(model, fix=True, out=tmp_path / "out")
    assert found.ok and load(tmp_path / "out") == load(model)


@pytest.mark.parametrize("out", [".", "inside", ".."])
def test_out_apart_from_the_directory(model, out):
    before = contents(model.parent)
    with pytest.raises(CheckpointError, match="lie in one another"):
        doctor(model, fix=True, out=model / out)
    assert contents(model.parent) == before


def test_out_that_exists(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        doctor(model, fix=True, out=tmp_path / "out")
    assert contents(tmp_path / "out") == {"file": b"mine"}
    doctor(model, fix=True, out=tmp_path / "out", overwrite=True)
    assert load(tmp_path / "out")["rope_theta"] == 5e5


def test_nothing_is_left_when_a_write_fails(model, tmp_path, monkeypatch):
    def fail(path, data):
        raise OSError(28, "No space left on device")

    # By module: the name extend.doctor is the function once `import extend` has run.
    monkeypatch.setattr(sys.modules["extend.doctor.fix"], "write_json", fail)
    before = contents(model)
    with pytest.raises(CheckpointError, match="no space"):
        doctor(model, fix=True, out=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        doctor(model, fix=True)
    after = contents(model)
    assert {k: v for k, v in after.items() if not k.endswith(KEPT_SUFFIX)} == before


def test_a_link_into_a_cache_is_replaced_not_followed(tmp_path):
    """The snapshots of a cache are links to shared files."""
    blob = tmp_path / "blob"
    blob.write_text(json.dumps(llama(rope_parameters=PLAIN)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(blob)
    doctor(tmp_path / "model", fix=True)
    assert "rope_theta" not in json.loads(blob.read_text())
    assert load(tmp_path / "model")["rope_theta"] == 5e5


def test_out_without_fix(model, tmp_path):
    with pytest.raises(RecipeError, match="--fix"):
        doctor(model, out=tmp_path / "out")


def test_refusal_says_what_is_left_and_how_to_go_on(tmp_path):
    model = save(tmp_path / "model", scaled({"rope_type": "linear", "factor": 4.0}))
    before = contents(model)
    with pytest.raises(CompatibilityError) as refused:
        doctor(model, fix=True)
    message = str(refused.value)
    assert "nothing was written" in message and "x factor 4" in message
    assert "--max-model-len 4096" in message and "--readers" in message
    assert contents(model) == before


def test_all_questions_at_once(tmp_path):
    config = llama(rope_theta=1e6, rope_scaling={**YARN, "rope_theta": 5e5},
                   rope_parameters=LLAMA3)
    with pytest.raises(CompatibilityError) as refused:
        doctor(save(tmp_path / "model", config), fix=True)
    assert "--keep" in str(refused.value) and "--theta" in str(refused.value)


def stored(directory, values):
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": values,
               "model.embed_tokens.weight": torch.zeros(2, 2)}, directory / "model.safetensors")
    return doctor(directory)


@pytest.mark.parametrize("values", [
    FREQUENCIES / 2, FREQUENCIES[:4], 1e4 ** (-torch.arange(0, 16, 2) / 16)])
def test_stored_frequencies_that_contradict(values, tmp_path):
    model = save(tmp_path / "model", llama(rope_theta=5e5))
    found = stored(model, values.contiguous())
    warned = next(f for f in found.findings if f.what == "stored frequencies")
    assert warned.severity == "warning" and "rotary_emb.inv_freq" in warned.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_frequencies_that_agree(dtype, tmp_path):
    model = save(tmp_path / "model", llama(rope_theta=5e5))
    found = stored(model, FREQUENCIES.to(dtype))
    assert not [f for f in found.findings if f.what == "stored frequencies"]
