"""The written tensors against PEFT's merge and the input file."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from extend.checkpoint import Checkpoint
from extend.errors import CompatibilityError
from extend.model_config import read_config
from extend.train.export import Exporter
from extend.train.mesh import Processes
from extend.train.model import load_model
from tests.train.tiny import options, save_model

ALONE = Processes(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tied=False)


def load(directory: Path, **changes: object):
    run = options(directory, [{"kind": "retrieval"}], **changes)
    return load_model(run, read_config(directory))


def export(model, source: Path, out: Path, dtype: str | None = None) -> dict[str, torch.Tensor]:
    out.mkdir()
    Exporter(Checkpoint(source), model, dtype).write(out, ALONE)
    return load_file(out / "model.safetensors")


def test_adapters_are_merged_as_peft_merges_them(model_dir: Path, tmp_path: Path):
    model = load(model_dir, mode="lora", lora_rank=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    got = export(model, model_dir, tmp_path / "out")

    twin = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear"))
    adapters = {f"base_model.model.{n}": p for n, p in model.named_parameters() if ".lora_" in n}
    missing = twin.load_state_dict(adapters, strict=False)
    assert not missing.unexpected_keys
    want = twin.merge_and_unload().state_dict()
    # One fp32 product of inner size 4, summed in another order.
    torch.testing.assert_close(got, dict(want), rtol=1e-5, atol=1e-6)
    assert not torch.equal(got["model.layers.0.mlp.up_proj.weight"],
                           load_file(model_dir / "model.safetensors")
                           ["model.layers.0.mlp.up_proj.weight"])


def test_untrained_tensors_are_the_input_to_the_bit(model_dir: Path, tmp_path: Path):
    """bf16 weights while training, but what was frozen comes from the fp32 file."""
    model = load(model_dir, weight_dtype="bfloat16", trainable=["norm"])
    got, source = export(model, model_dir, tmp_path / "out"), load_file(
        model_dir / "model.safetensors")
    torch.testing.assert_close(got, source, rtol=0, atol=0)  # norms are ones: exact in bf16
    assert {t.dtype for t in got.values()} == {torch.float32}


def test_export_dtype(model_dir: Path, tmp_path: Path):
    got = export(load(model_dir), model_dir, tmp_path / "out", "bfloat16")
    source = load_file(model_dir / "model.safetensors")
    torch.testing.assert_close(got, {n: t.bfloat16() for n, t in source.items()}, rtol=0, atol=0)


def test_stale_frequencies_are_left_out(model_dir: Path, tmp_path: Path):
    stale = "model.layers.0.self_attn.rotary_emb.inv_freq"
    (tmp_path / "old").mkdir()
    source = load_file(model_dir / "model.safetensors")
    save_file(source | {stale: torch.ones(4)}, tmp_path / "old" / "model.safetensors")
    got = export(load(model_dir), tmp_path / "old", tmp_path / "out")
    assert set(got) == set(source)


@pytest.mark.parametrize("change", ["extra", "missing"])
def test_names_that_do_not_line_up_are_refused(change: str, model_dir: Path, tmp_path: Path):
    source = load_file(model_dir / "model.safetensors")
    if change == "extra":
        source["model.layers.0.mlp.gate_up_proj.weight"] = torch.ones(2)
    else:
        del source["lm_head.weight"]  # untied, so it cannot be left out
    save_file(source, tmp_path / "model.safetensors")
    with pytest.raises(CompatibilityError, match="gate_up_proj|lm_head"):
        Exporter(Checkpoint(tmp_path), load(model_dir), None)
