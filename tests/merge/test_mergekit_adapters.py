"""Adapters that mergekit extracted, merged and compared with base + delta taken here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mergekit.scripts import extract_lora
from safetensors.torch import load_file, save_file

from extend.cli import main
from extend.errors import CheckpointError, CompatibilityError
from extend.evaluate.adapted import add_adapter
from extend.merge import merge, preview
from tests.adapter_format.tiny_models import LONG_THETA
from tests.merge.test_apply import ULP, foreign_adapter, weights


def extracted(models, out: Path, *options: str) -> Path:
    """What mergekit makes of a pair of models, at full rank."""
    done = CliRunner().invoke(extract_lora.main, [
        "--model", str(models.tuned), "--base-model", str(models.base), "--out-path", str(out),
        "--max-rank", "96", *options])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def adapters(case, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mergekit")
    return {"whole": extracted(case.models, root / "whole"),
            "factors": extracted(case.models, root / "factors", "--embed-lora")}


@pytest.mark.parametrize("kind", ["whole", "factors"])
def test_a_merge_adds_what_the_tuned_model_changed(case, adapters, tmp_path, kind):
    """Norms, embeddings and biases too; mergekit stores them whole, as factors, or as deltas."""
    models = case.models
    stored = load_file(adapters[kind] / "adapter_model.safetensors")
    assert any(key.endswith("norm.weight") for key in stored)
    assert any("lora_embedding_A" in key for key in stored) == (kind == "factors")
    assert any(key.endswith("lora_B.bias") for key in stored) == ("qwen2" in models.base.parts[-2])
    out = weights(merge(adapters[kind], models.target, tmp_path / "out", base=models.base,
                        rope_from=models.tuned))
    base, tuned, target = (weights(d) for d in (models.base, models.tuned, models.target))
    assert set(out) == set(target)
    for name, value in target.items():
        delta = tuned[name].double() - base[name].double()
        expected = value.double() + delta
        exact = not any(f"{name.removesuffix('.weight')}.lora{part}" in key for key in stored
                        for part in ("_A", "_embedding_A"))
        # Factors in the dtype of the models: in bf16 each of two has a relative error of 2^-9.
        noise = 0 if exact else (4e-6 if case.dtype == torch.float32 else 0.01)
        if case.dtype == torch.bfloat16 and name.endswith("bias"):
            noise = 2 ** -9  # of a difference that mergekit takes in bf16
        torch.testing.assert_close(out[name].double(), expected, rtol=ULP[case.dtype],
                                   atol=1e-7 + noise * float(delta.abs().max()) * 10)
        assert not torch.equal(out[name], value)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == LONG_THETA


def test_merging_into_the_base_gives_the_tuned_norms_and_embeddings_exactly(case, adapters,
                                                                            tmp_path):
    models = case.models
    out = weights(merge(adapters["whole"], models.base, tmp_path / "out", base=models.base,
                        rope_from=models.tuned))
    tuned = weights(models.tuned)
    for name in [n for n in tuned if n.endswith(("norm.weight", "embed_tokens.weight"))]:
        torch.testing.assert_close(out[name], tuned[name], rtol=2.0 ** -23, atol=0)


def test_without_the_base_it_is_refused(case, adapters, tmp_path):
    with pytest.raises(CompatibilityError, match=r"holds whole values of \d+ parameters .*--base"):
        merge(adapters["whole"], case.models.target, tmp_path / "out", rope_from=case.models.tuned)
    found = preview(adapters["whole"], case.models.target, tmp_path / "out")
    assert any("holds whole values" in line for line in found.problems)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reads_no_value(case, adapters, tmp_path):
    found = preview(adapters["whole"], case.models.target, tmp_path / "out",
                    base=case.models.base, rope_from=case.models.tuned)
    assert found.problems == ()
    names = set(weights(case.models.target))
    assert found.modules + found.sidecar_tensors == len(names)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory) -> Path:
    return extracted(llama.models, tmp_path_factory.mktemp("whole") / "adapter")


def test_from_the_command_line(llama, whole, tmp_path):
    adapter = whole
    arguments = ["merge", "--adapter", str(adapter), "--target", str(llama.models.target),
                 "--rope-from", str(llama.models.tuned), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "give --base" in done.stderr
    done = CliRunner().invoke(main, [*arguments, "--base", str(llama.models.base)])
    assert done.exit_code == 0, done.output


def test_values_of_a_base_of_another_size(llama, whole, tmp_path):
    adapter = Path(shutil.copytree(whole, tmp_path / "adapter"))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.norm.weight"
    save_file({**tensors, key: torch.ones(63)}, file)
    with pytest.raises(CompatibilityError, match=r"model.norm.weight .*\[63\].*\[64\]"):
        merge(adapter, llama.models.target, tmp_path / "out", base=llama.models.base,
              rope_from=llama.models.tuned)
    tensors["base_model.model.model.layers.7.input_layernorm.weight"] = torch.ones(64)
    save_file(tensors, file)
    with pytest.raises(CompatibilityError, match=r"layers.7.input_layernorm.weight, but the base"):
        merge(adapter, llama.models.target, tmp_path / "out", base=llama.models.base,
              rope_from=llama.models.tuned)


# ---- the same kinds of tensors, as PEFT itself writes them ---------------------------------------

def peft_model(target: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("options", [
    {"r": 4, "lora_alpha": 12, "target_modules": ["embed_tokens", "q_proj"]},
    {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"], "lora_bias": True}],
    ids=["embedding", "lora_bias"])
def test_embedding_factors_and_biases_equal_pefts(tmp_path, options):
    from tests.adapter_format.tiny_models import build, save

    model = build("llama", attention_bias=True, mlp_bias=True)
    target = save(model, tmp_path / "target", torch.float32)
    adapter = foreign_adapter(target, tmp_path / "adapter", **options)
    file = adapter / "adapter_model.safetensors"
    save_file({key: torch.randn(value.shape) * 0.05 if "embedding_A" in key else value
               for key, value in load_file(file).items()}, file)
    out = weights(merge(adapter, target, tmp_path / "out", rope_from=target))
    expected = peft_model(target, adapter, torch.float32)
    changed = [name for name, value in weights(target).items() if not torch.equal(out[name], value)]
    assert len(changed) > 2
    for name, value in out.items():
        torch.testing.assert_close(value, expected[name], rtol=2.0 ** -22, atol=2e-7)
    loaded = build("llama", attention_bias=True, mlp_bias=True)
    add_adapter(loaded, adapter)
    for name, value in out.items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=1e-7)


def test_whole_values_of_peft_become_deltas(llama, tmp_path):
    """On the base itself they give what PEFT's merge gives: the stored values."""
    adapter = foreign_adapter(llama.models.base, tmp_path / "adapter", r=4, lora_alpha=4,
                              target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.weight"
    tensors[key] = tensors[key] + 0.25
    save_file(tensors, file)
    out = weights(merge(adapter, llama.models.base, tmp_path / "out", base=llama.models.base,
                        rope_from=llama.models.tuned))
    expected = peft_model(llama.models.base, adapter, torch.float32)
    for name, value in out.items():
        torch.testing.assert_close(value, expected[name], rtol=2.0 ** -22, atol=2e-7)


def test_a_bias_without_its_factors(llama, adapter, tmp_path):
    file = Path(shutil.copytree(adapter, tmp_path / "a")) / "adapter_model.safetensors"
    (file.parent / "extend_sidecar.json").unlink()
    save_file({**load_file(file), "base_model.model.model.layers.5.mlp.up_proj.lora_B.bias":
               torch.ones(96)}, file)
    with pytest.raises(CheckpointError, match="layers.5.mlp.up_proj has a bias on lora_B but no"):
        merge(file.parent, llama.models.target, tmp_path / "out", rope_from=llama.models.tuned)
