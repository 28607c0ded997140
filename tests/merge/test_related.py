"""A merge into a model that shares nothing with the adapter's base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.delta.lineage import compare
from extend.delta.sample import SAMPLE_NAME
from extend.delta.sources import BaseModel
from extend.errors import CheckpointError, CompatibilityError
from extend.merge import merge


def change_weights(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({n: change(n, x) for n, x in sorted(tensors.items())},
              directory / "model.safetensors", metadata={"format": "pt"})


def make_stranger(directory) -> None:
    generator = torch.Generator().manual_seed(9)
    change_weights(directory, lambda name, x: x if x.dim() == 1 else
                   0.04 * torch.randn(x.shape, generator=generator))


def recorded(out) -> dict:
    return json.loads((out / "manifest.json").read_text())["results"]["lineage"]


def test_unrelated_target_is_refused(llama, target, tmp_path):
    make_stranger(target)
    out = tmp_path / "out"
    with pytest.raises(CompatibilityError, match=r"no fine-tune of the base of .*adapter: "
                                                 r"unrelated: .*cosine .* to .*"):
        merge(llama.adapter, target, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_shuffled_neurons_are_refused(llama, target, tmp_path):
    """Layers without the strong common directions that the tiny models are built with."""
    models = {}
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    index = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    for name in ("base", "target"):
        models[name] = tmp_path / name
        shutil.copytree(target, models[name])
        make_stranger(models[name])
    change_weights(models["target"], lambda name, x: x.index_select(
        index[name.split(".")[-2]], order) if ".mlp." in name else x)
    tuned = tmp_path / "tuned"
    shutil.copytree(models["base"], tuned)
    change_weights(tuned, lambda name, x: x * 1.01)
    with pytest.raises(CompatibilityError, match=r"unrelated in part.*mlp\.down_proj"):
        merge(None, models["target"], tmp_path / "out", tuned=tuned, base=models["base"])
    merge(None, models["base"], tmp_path / "out", tuned=tuned, base=models["base"])


def test_drifted_target_is_warned_of_and_recorded(llama, tmp_path, caplog):
    out = merge(llama.adapter, llama.models.target, tmp_path / "out")
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "a heavily tuned one (cosine 0.9" in warnings[0]
    found = recorded(out)[str(llama.adapter)]
    assert found["kind"] == "heavy" and found["sampled"]
    assert found["verdict"] in warnings[0]
    base, target = BaseModel.open(llama.models.base), BaseModel.open(llama.models.target)
    truth = compare(base.files, base.infos, target.files, target.infos).overall.drift().value
    drift = found["drift"]
    assert abs(drift["value"] - truth) < drift["high"] - drift["low"] < 0.1


def test_light_target_is_silent(llama, target, tmp_path, caplog):
    shutil.rmtree(target)
    shutil.copytree(llama.models.base, target)
    change_weights(target, lambda name, x: x + 0.001)
    out = merge(llama.adapter, target, tmp_path / "out")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert recorded(out)[str(llama.adapter)]["kind"] == "light"


def test_adapter_without_a_sample_is_merged_as_it_is(llama, adapter, target, tmp_path):
    make_stranger(target)
    (adapter / SAMPLE_NAME).unlink()
    assert recorded(merge(adapter, target, tmp_path / "out")) == {}


def test_weight_zero_adds_nothing_that_could_be_noise(llama, target, tmp_path):
    make_stranger(target)
    assert recorded(merge(llama.adapter, target, tmp_path / "out", weight=0.0)) == {}


def test_the_base_itself_is_taken_where_it_is_given(llama, adapter, target, tmp_path):
    make_stranger(target)
    (adapter / SAMPLE_NAME).unlink()
    with pytest.raises(CompatibilityError, match=rf"no fine-tune of {llama.models.base}: unrel"):
        merge(adapter, target, tmp_path / "out", base=llama.models.base)


def test_damaged_sample(llama, adapter, tmp_path):
    path = adapter / SAMPLE_NAME
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{SAMPLE_NAME}.*truncated"):
        merge(adapter, llama.models.target, tmp_path / "out")
